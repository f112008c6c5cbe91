"""Reading of a client's schema, batches and metadata of batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import pyarrow as pa
from msgspec import Meta
from pyarrow import flight

from fletcher.core.schema_text import check_schema_text
from fletcher.errors import ColumnTypeError, InvalidCommandError
from fletcher.flight.requests import field_error
from fletcher.serving.callers import Caller

# Largest integer that JSON readers in all languages keep exact.
MAX_ROW_OFFSET = 2**53 - 1
# Usual metadata has about 100 bytes. Decoded to Python objects, JSON takes many times its size.
MAX_METADATA_BYTES = 64 << 10

_Offset = Annotated[int, Meta(ge=0, le=MAX_ROW_OFFSET)]


class BatchMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's metadata of one batch; see docs/wire.md."""

    batch_id: _Offset | None = None  # the client's number for the batch
    row_offset: _Offset | None = None  # offset of the batch's first row in the upload
    end: bool = False  # this is the last message
    rows: _Offset | None = None  # with `end`: number of rows in the upload
    document_end: bool = False  # `continuous` exchange: the last row ends its document


_NOTHING = BatchMetadata()
_decoder = msgspec.json.Decoder(BatchMetadata)


def parse_batch_metadata(raw: bytes | None) -> BatchMetadata:
    """Parse a batch's `app_metadata`; None and empty stand for `{}`.

    Raises:
        InvalidCommandError: The metadata is too large or not a JSON object, or a field is unknown,
            missing or of the wrong type.
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
        # msgspec takes the last value of a repeated field. No valid value has a colon.
        if raw.count(b":") > 1 and raw.count(b":") != len(msgspec.json.decode(raw)):
            raise InvalidCommandError(
                "`app_metadata` of a batch gives a field twice; give it once", field="app_metadata"
            )
    except (ValueError, RecursionError) as error:
        raise _metadata_error(error, raw) from None
    if metadata.end and metadata.rows is None:
        raise InvalidCommandError('`rows` is missing beside `"end": true`', field="rows")
    return metadata


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """One message of a client."""

    batch: pa.RecordBatch | None  # None if the message has only metadata
    batch_id: int  # the client's number for the batch, or the count of batches so far
    row_first: int  # offset of the first row in the upload
    metadata: BatchMetadata


def read_messages(
    reader: Any, caller: Caller, *, continuous: bool = False
) -> Iterator[ReceivedMessage]:
    """Read a client's messages until it ends the call or disconnects.

    Args:
        reader: The call's reader.
        caller: The call's client.
        continuous: Whether rows are parts of documents and `document_end` is allowed.

    Raises:
        ColumnTypeError: Arrow cannot decode a message.
        InvalidCommandError: A message's metadata is invalid.
    """
    batch_id = row_next = 0
    while True:
        try:
            with caller.reading():
                chunk = reader.read_chunk()
        except StopIteration:
            return
        except (flight.FlightError, pa.ArrowException, OSError) as error:
            if isinstance(error, flight.FlightCancelledError) or caller.is_cancelled():
                return
            if isinstance(error, flight.FlightError):
                raise
            message = f"a message cannot be decoded: {str(error)[:300]}"
            raise ColumnTypeError(message) from None
        raw = chunk.app_metadata
        metadata = parse_batch_metadata(None if raw is None else raw.to_pybytes())
        if metadata.document_end and (chunk.data is None or not continuous):
            raise InvalidCommandError(
                "`document_end` came without a batch; send it with one, which may have no rows"
                if continuous
                else "`document_end` is given, but every row is a document; set "
                "`continuous` in the command of a DoExchange, or leave it out",
                field="document_end",
            )
        batch_id = batch_id if metadata.batch_id is None else metadata.batch_id
        row_first = row_next if metadata.row_offset is None else metadata.row_offset
        yield ReceivedMessage(chunk.data, batch_id, row_first, metadata)
        if chunk.data is not None:
            batch_id, row_next = batch_id + 1, row_first + chunk.data.num_rows


def wait_first(
    messages: Iterator[ReceivedMessage],
) -> tuple[Iterator[ReceivedMessage], ReceivedMessage | None]:
    """Wait for the first message.

    Returns two values: an iterator over all messages including the first one, and the first message
    or None.
    """
    first = next(messages, None)
    return (messages if first is None else itertools.chain([first], messages)), first


def read_schema(reader: Any) -> pa.Schema:
    """Read the input's schema. Raises ColumnTypeError if it cannot be read."""
    try:
        schema = reader.schema
    except flight.FlightError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ColumnTypeError(f"the stream's schema cannot be read: {str(error)[:300]}") from None
    check_schema_text(schema)
    return schema


def _metadata_error(error: Exception, raw: bytes) -> InvalidCommandError:
    text = str(error) if isinstance(error, msgspec.ValidationError) else ""
    if " - at `$." in text:
        return field_error(text)
    if "unknown field" in text:
        return InvalidCommandError(
            f"`app_metadata` of a batch: {text[:300]}",
            field="app_metadata",
            allowed=BatchMetadata.__struct_fields__,
        )
    shown = raw[:100].decode(errors="backslashreplace")
    return InvalidCommandError(
        f"`app_metadata` of a batch is {shown!r}, expected a JSON object like "
        '{"batch_id": 0, "row_offset": 0}',
        field="app_metadata",
    )
