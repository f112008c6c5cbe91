"""Sources of models, with one module for each kind of source.

A source is a function `(…, staging: Path, exits, progress) -> ModelSpec` that writes a bundle's
files into `staging`. The registry makes a bundle of these files and moves the bundle into place.
"""
