"""Sources of models, a module for each kind.

A source is a function `(…, staging: Path, progress) -> ModelSpec` that writes a bundle's files into
`staging`. The registry makes a bundle of them and moves it into place.
"""
