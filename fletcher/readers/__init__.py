"""Text from files, folders and standard input as one stream of batches.

This package depends only on pyarrow and Fletcher's errors, because the client library uses it.
"""

from __future__ import annotations

from fletcher.readers.files import FORMATS
from fletcher.readers.source import TextSource, open_source

__all__ = ["FORMATS", "TextSource", "open_source"]
