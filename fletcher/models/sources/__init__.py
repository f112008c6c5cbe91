"""Where models come from: one module a kind of source, each filling a folder with a bundle's files.

A source is a function `(…, staging: Path, progress) -> ModelSpec`; the registry makes a bundle of
what it wrote and moves it into place.
"""
