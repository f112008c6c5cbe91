"""Jobs: files that are sent to a dataset, and the manifest that says which of them are stored."""

from __future__ import annotations
