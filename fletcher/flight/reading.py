"""Reading of a client's schema and batches, for DoPut and DoExchange."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.errors import ColumnTypeError, InvalidCommandError
from fletcher.flight.messages import BatchMetadata, parse_batch_metadata


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """One message of a client.

    Attributes:
        batch: Rows; None if the message has metadata alone.
        batch_id: The client's number for the batch, or the count of batches so far.
        row_first: Offset of the first row in the upload.
        metadata: The client's metadata.
    """

    batch: pa.RecordBatch | None
    batch_id: int
    row_first: int
    metadata: BatchMetadata


def read_messages(
    reader: Any, context: Any, *, continuous: bool = False
) -> Iterator[ReceivedMessage]:
    """Read a client's messages until it ends the call or disconnects.

    Args:
        reader: The call's reader.
        context: The call's context.
        continuous: Rows are parts of documents, so that `document_end` is allowed.

    Raises:
        ColumnTypeError: Arrow cannot decode a message.
        InvalidCommandError: A message's metadata is invalid.
    """
    batch_id = row_next = 0
    while True:
        try:
            chunk = reader.read_chunk()
        except StopIteration:
            return
        except (flight.FlightError, OSError) as error:
            if isinstance(error, flight.FlightCancelledError) or context.is_cancelled():
                return
            if isinstance(error, flight.FlightError):
                raise
            raise _undecodable(error) from None
        except pa.ArrowException as error:
            if context.is_cancelled():
                return
            raise _undecodable(error) from None
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

    Returns:
        All messages, and the first one; None if there is none.
    """
    first = next(messages, None)
    return (messages if first is None else itertools.chain([first], messages)), first


def read_schema(reader: Any) -> pa.Schema:
    """Read the input's schema.

    Raises:
        ColumnTypeError: Arrow cannot read it.
    """
    try:
        schema = reader.schema
        _ = schema.names  # Arrow does not check that names are UTF-8
    except flight.FlightError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ColumnTypeError(f"the stream's schema cannot be read: {str(error)[:300]}") from None
    return schema


def _undecodable(error: Exception) -> ColumnTypeError:
    return ColumnTypeError(f"a message cannot be decoded: {str(error)[:300]}")
