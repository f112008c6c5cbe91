"""Paths on this machine, told apart from addresses elsewhere."""

from __future__ import annotations

import re

from fletcher.errors import ConfigError

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):/{2}")


def is_uri(text: str) -> bool:
    """Whether a text is a URI, such as `s3://bucket/file`, rather than a path."""
    return _SCHEME.match(text) is not None


def check_local(path: str, field: str) -> None:
    """Refuse a URI where a path is expected, as it would name a folder such as `s3:`.

    Raises:
        ConfigError: `path` is a URI.
    """
    scheme = _SCHEME.match(path)
    if scheme:
        raise ConfigError(
            f"`{field}` is {path[:200]!r}, and {scheme[1]}:// is not supported here; give a path "
            "on this machine",
            field=field,
        )
