"""Measurements beside a named peer, in the same run on the same cores; docs/performance.md."""
