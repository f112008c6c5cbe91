"""Errors cut to what the trailers of a gRPC call bear.

gRPC refuses more than 8 KiB of trailers. The client then gets RESOURCE_EXHAUSTED, without the
error's text or code. The text is sent percent-encoded, and the JSON in base64 (except between two
peers of the same gRPC library).
"""

from __future__ import annotations

from bisect import bisect_right
from urllib.parse import quote

from fletcher.errors import FletcherError

_MAX_TEXT_BYTES = 1500  # of the percent-encoded text
_MAX_FIELD_BYTES = 150  # the same of `field`
_MAX_ITEM_BYTES = 300  # the same of one item of `allowed`
_MAX_JSON_BYTES = 4000
_UNQUOTED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


def fitted(error: FletcherError) -> FletcherError:
    """Copy an error so that its text and JSON fit into trailers.

    Texts that were cut end in `...`. The last item of a shortened `allowed` says how many are left
    out.
    """
    message = _cut(error.message, _MAX_TEXT_BYTES)
    field = None if error.field is None else _cut(error.field, _MAX_FIELD_BYTES)

    def with_allowed(allowed: list[str] | None) -> FletcherError:
        return type(error)(
            message, field=field, allowed=allowed, retry_after_ms=error.retry_after_ms
        )

    if error.allowed is None:
        return with_allowed(None)
    # Of 100,000 items, only as many are looked at as may fit with 4 bytes each.
    most = min(len(error.allowed), _MAX_JSON_BYTES // 4)
    items = [_cut(item, _MAX_ITEM_BYTES) for item in error.allowed[:most]] + error.allowed[most:]
    if len((copy := with_allowed(_listed(items, most))).to_json()) <= _MAX_JSON_BYTES:
        return copy
    num_kept = bisect_right(
        range(most),
        _MAX_JSON_BYTES,
        key=lambda number: len(with_allowed(_listed(items, number)).to_json()),
    )
    return with_allowed(_listed(items, max(0, num_kept - 1)))


def _listed(items: list[str], num_kept: int) -> list[str]:
    left_out = len(items) - num_kept
    return [*items[:num_kept], f"... and {left_out} more"] if left_out else items


def _cut(text: str, max_bytes: int) -> str:
    """Cut a text to a number of bytes, as they are sent percent-encoded."""
    if len(text) <= max_bytes and _quoted_size(text) <= max_bytes:
        return text
    kept = bisect_right(range(max_bytes), max_bytes - 3, key=lambda end: _quoted_size(text[:end]))
    return text[: kept - 1] + "..."


def _quoted_size(text: str) -> int:
    return len(quote(text, safe=_UNQUOTED))
