"""Fletcher: text in over Arrow Flight, vectors in a store."""
