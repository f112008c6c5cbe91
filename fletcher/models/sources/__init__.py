"""Sources of models, one module for each kind; each writes a bundle's files into a folder.

A source is a function `(…, staging: Path, progress) -> ModelSpec`. The registry makes a bundle of
the files and moves it into place.
"""
