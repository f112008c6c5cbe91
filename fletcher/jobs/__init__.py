"""Jobs: files that are sent to a dataset, and the manifest of what is stored."""

from __future__ import annotations
