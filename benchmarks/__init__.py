"""Measurements beside named peers, in the same run on the same cores; see docs/lab-book.md."""
