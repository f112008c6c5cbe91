"""What travels in `app_metadata`: batch numbers and the end marker in, errors out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fletcher.errors import InvalidCommandError

MAX_ROW_OFFSET = 2**53 - 1  # what JSON readers in any language keep exact
# Of a batch's `app_metadata`, which takes a hundred; Python's objects are many times the JSON.
MAX_METADATA_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class BatchMetadata:
    """What a client said with a batch; see docs/wire.md, Input.

    Attributes:
        batch_id: Its number for the batch.
        row_offset: Offset of the batch's first row in the upload.
        end: This is the last message.
        rows: With `end`: rows of the whole upload.
        document_end: The last row ends its document; of a `continuous` exchange.
    """

    batch_id: int | None = None
    row_offset: int | None = None
    end: bool = False
    rows: int | None = None
    document_end: bool = False


_FIELDS = ("batch_id", "row_offset", "end", "rows", "document_end")


def parse_batch_metadata(raw: bytes | None) -> BatchMetadata:
    """Reads a batch's `app_metadata`; none is as good as `{}`.

    Raises:
        InvalidCommandError: It is no JSON object, or a value is of the wrong kind.
    """
    if not raw:
        return BatchMetadata()
    if len(raw) > MAX_METADATA_BYTES:
        raise InvalidCommandError(
            f"`app_metadata` of a batch has {len(raw)} bytes, at most {MAX_METADATA_BYTES}",
            field="app_metadata",
        )
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InvalidCommandError(
            '`app_metadata` of a batch is not a JSON object like {"batch_id": 0, "row_offset": 0}',
            field="app_metadata",
        )
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise InvalidCommandError(
            f"`app_metadata` of a batch has the unknown field `{unknown[0][:200]}`",
            field="app_metadata",
            allowed=_FIELDS,
        )
    end = _flag(fields, "end")
    metadata = BatchMetadata(
        _whole(fields, "batch_id"),
        _whole(fields, "row_offset"),
        end,
        _whole(fields, "rows"),
        _flag(fields, "document_end"),
    )
    if end and metadata.rows is None:
        raise InvalidCommandError('`rows` is missing beside `"end": true`', field="rows")
    return metadata


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise InvalidCommandError(f"`{name}` is not true or false", field=name)
    return value


def _whole(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_ROW_OFFSET:
        raise InvalidCommandError(
            f"`{name}` is {json.dumps(value)[:100]}, expected a whole number from 0 to "
            f"{MAX_ROW_OFFSET}",
            field=name,
        )
    return value
