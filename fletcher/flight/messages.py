"""Metadata of a client's batches: numbers, offsets and the end marker."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from fletcher.errors import InvalidCommandError
from fletcher.flight.requests import field_error

# JSON readers in any language keep integers up to this one exact.
MAX_ROW_OFFSET = 2**53 - 1
# Metadata takes a hundred bytes; Python's objects are many times the JSON.
MAX_METADATA_BYTES = 64 << 10

_Offset = Annotated[int, Meta(ge=0, le=MAX_ROW_OFFSET)]


class BatchMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's metadata of one batch; see docs/wire.md.

    Attributes:
        batch_id: The client's number for the batch.
        row_offset: Offset of the batch's first row in the upload.
        end: This is the last message.
        rows: With `end`, rows of the whole upload.
        document_end: The last row ends its document; of a `continuous` exchange.
    """

    batch_id: _Offset | None = None
    row_offset: _Offset | None = None
    end: bool = False
    rows: _Offset | None = None
    document_end: bool = False


_NOTHING = BatchMetadata()
_decoder = msgspec.json.Decoder(BatchMetadata)


def parse_batch_metadata(raw: bytes | None) -> BatchMetadata:
    """Parse a batch's `app_metadata`; None and empty stand for `{}`.

    Raises:
        InvalidCommandError: It is not a JSON object, has an unknown field, or a value has the wrong
            type.
    """
    if not raw:
        return _NOTHING
    if len(raw) > MAX_METADATA_BYTES:
        raise InvalidCommandError(
            f"`app_metadata` of a batch has {len(raw)} bytes, at most {MAX_METADATA_BYTES}",
            field="app_metadata",
        )
    try:
        metadata = _decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise _refusal(error, raw) from None
    except (ValueError, RecursionError):
        raise _no_object(raw) from None
    if metadata.end and metadata.rows is None:
        raise InvalidCommandError('`rows` is missing beside `"end": true`', field="rows")
    return metadata


def _refusal(error: msgspec.ValidationError, raw: bytes) -> InvalidCommandError:
    text = str(error)
    if " - at `$." in text:
        return field_error(error)
    if "unknown field" in text:
        return InvalidCommandError(
            f"`app_metadata` of a batch: {text[:300]}",
            field="app_metadata",
            allowed=BatchMetadata.__struct_fields__,
        )
    return _no_object(raw)


def _no_object(raw: bytes) -> InvalidCommandError:
    shown = raw[:100].decode(errors="backslashreplace")
    return InvalidCommandError(
        f"`app_metadata` of a batch is {shown!r}, expected a JSON object like "
        '{"batch_id": 0, "row_offset": 0}',
        field="app_metadata",
    )
