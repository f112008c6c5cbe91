"""Messages of uploads and exchanges: batches, acknowledgements, summaries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import msgspec
import pyarrow as pa
from pyarrow import types

from fletcher.errors import InternalError, InvalidCommandError
from fletcher.net.message_size import batch_bytes, cut_batch


@dataclass(frozen=True, slots=True)
class RowError:
    """The error of a row without a vector; `row` is its offset in the upload.

    `file` is the file of the row, if several files were sent.
    """

    row: int | None
    id: str | int | None
    code: str
    message: str
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Ack:
    """Progress of an upload; `rows_*` are totals over all its connections."""

    upload_id: str
    batch_id: int
    row_first: int
    row_last: int
    rows_received: int
    rows_stored: int
    rows_failed: int
    rows_durable: int


@dataclass(frozen=True, slots=True)
class PutSummary:
    """Result of an upload; counts include earlier connections.

    Attributes:
        upload_id: Name of the upload; pass it again to resume. Empty for several files.
        complete: Whether the server knows the number of rows and has finished all of them.
        rows_received: Rows that arrived.
        rows_stored: Rows in the store.
        rows_failed: Rows without a vector; `errors` says why.
        rows_durable: Rows at the start of the upload that survive a crash.
        rows_deduplicated: Rows dropped as duplicates.
        model: `name@hash` of the model.
        errors: Errors of the first failed rows.
        errors_truncated: Whether more rows failed than `errors` lists.
        rows_skipped: Rows not sent because the server had them from an earlier run.
        uploads: Pairs of file and `upload_id`, if several files were sent.
    """

    upload_id: str
    complete: bool
    rows_received: int
    rows_stored: int
    rows_failed: int
    rows_durable: int
    rows_deduplicated: int = 0
    model: str = ""
    errors: tuple[RowError, ...] = ()
    errors_truncated: bool = False
    rows_skipped: int = 0
    uploads: tuple[tuple[str, str], ...] = ()


_REPLIES: dict[Any, type[Ack | PutSummary]] = {"ack": Ack, "summary": PutSummary}


def parse_reply(body: bytes) -> Ack | PutSummary | None:
    """The acknowledgement or summary in a PutResult; None for other types of messages."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
        kind = _REPLIES.get(fields.get("type"))
        return None if kind is None else msgspec.convert(fields, kind)
    except (msgspec.DecodeError, TypeError):
        raise InternalError(
            f"the server sent {body[:200]!r}, expected an acknowledgement or a summary"
        ) from None


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A batch to send."""

    batch: pa.RecordBatch
    batch_id: int  # number of the message in the upload or exchange
    row_first: int
    num_bytes: int  # size on the wire, uncompressed and without dictionaries
    last: bool  # whether it ends a batch of the input
    document_end: bool = False  # whether it ends a document (`continuous`)

    @property
    def row_last(self) -> int:
        return self.row_first + int(self.batch.num_rows) - 1

    def cut(self, first: int, last: int, batch_id: int) -> Message:
        """The rows `first` to `last` of an upload's message, as a message of that number."""
        if (first, last) == (self.row_first, self.row_last):
            return replace(self, batch_id=batch_id)
        batch = self.batch.slice(first - self.row_first, last - first + 1)
        return Message(batch, batch_id, first, batch_bytes(batch), self.last)

    def metadata(self) -> bytes:
        """The message's `app_metadata`."""
        fields = {"batch_id": self.batch_id, "row_offset": self.row_first}
        if self.document_end:
            fields["document_end"] = True
        return json.dumps(fields).encode()


def end_marker(num_rows: int) -> bytes:
    """The `app_metadata` that ends an upload with this number of rows."""
    return json.dumps({"end": True, "rows": num_rows}).encode()


def messages(
    batches: Iterable[pa.RecordBatch], *, max_bytes: int, row_offset: int = 0
) -> Iterator[Message]:
    """Cut batches into messages of at most `max_bytes`.

    A larger row becomes one message. Batches without rows are left out.
    """
    batch_id, row = 0, row_offset
    for batch in batches:
        end = row + batch.num_rows
        for part in cut_batch(batch, max_bytes) if batch.num_rows else ():
            last = row + part.num_rows == end
            yield Message(part, batch_id, row, batch_bytes(part), last)
            batch_id += 1
            row += part.num_rows


def as_batches(data: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema and batches of tabular data.

    Args:
        data: A RecordBatch, Table, RecordBatchReader, `fletcher.TextSource`, a DataFrame with
            `__arrow_c_stream__`, or an iterable of RecordBatches of one schema.

    Raises:
        InvalidCommandError: `data` is of another type.
    """
    if isinstance(data, pa.RecordBatch):
        schema, batches = data.schema, iter([data])
    elif isinstance(data, pa.Table):
        schema, batches = data.schema, iter(data.to_batches())
    elif isinstance(data, pa.RecordBatchReader):
        schema, batches = data.schema, iter(data)
    elif hasattr(data, "batches") and hasattr(data, "schema"):
        schema, batches = data.schema, data.batches()
    elif hasattr(data, "__arrow_c_stream__"):  # pandas, Polars, DuckDB
        reader = pa.RecordBatchReader.from_stream(data)
        schema, batches = reader.schema, iter(reader)
    else:
        batches = iter(data) if isinstance(data, Iterable) else iter(())
        first = next(batches, None)
        if not isinstance(first, pa.RecordBatch):
            raise InvalidCommandError(_no_batches(data, first), field="data")
        schema, batches = first.schema, chain([first], batches)
    plain = _without_views(schema)
    if plain is schema:
        return schema, batches
    return plain, (batch.cast(plain) for batch in batches)


def _no_batches(data: Any, first: Any) -> str:
    found = f"`data` is a {type(data).__name__}"
    if isinstance(data, Mapping):
        remedy = "pyarrow.table(data) makes a Table of columns"
    elif isinstance(first, Mapping):
        found += f" of a {type(first).__name__}"
        remedy = "pyarrow.Table.from_pylist(data) makes a Table of rows"
    else:
        if isinstance(data, Iterable):
            found += f" of {'nothing' if first is None else f'a {type(first).__name__}'}"
        remedy = "for no rows pass an empty Table, which has a schema"
    return (
        f"{found}, expected a RecordBatch, a Table, a RecordBatchReader, a DataFrame or an "
        f"iterable of RecordBatches; {remedy}"
    )


def _without_views(schema: pa.Schema) -> pa.Schema:
    """Replace string views by large_utf8: a slice of a view column sends all of it."""
    views = [index for index, one in enumerate(schema) if types.is_string_view(one.type)]
    for index in views:
        schema = schema.set(index, schema.field(index).with_type(pa.large_utf8()))
    return schema
