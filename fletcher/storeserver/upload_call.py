"""Upload calls of the store server: reads rows and writes acknowledgements."""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import msgspec
import pyarrow as pa

from fletcher.core.encodings import is_text
from fletcher.core.schema_text import check_schema_text
from fletcher.errors import (
    BatchTooLargeError,
    ColumnTypeError,
    FletcherError,
    InvalidCommandError,
    UnknownColumnError,
)
from fletcher.stores.lance.store import LanceStore
from fletcher.stores.protocol import GroupHeader
from fletcher.stores.schemas import check_compatible
from fletcher.storeserver.ingest import Ingest
from fletcher.storeserver.requests import decode_request
from fletcher.storeserver.stored_columns import as_stored, decode_columns
from fletcher.storeserver.submissions import CommitStream, SubmittedRows
from fletcher.storeserver.vector_checks import check_vectors
from fletcher.util.threads import start_thread

_log = logging.getLogger(__name__)

MAX_GROUP_BYTES = 512 << 20
# Limit of acknowledgements that are queued for a client. At the limit, the server stops reading the
# client's rows.
MAX_UNREAD_ACKS = 1024


def read_groups(
    ingest: Ingest, dataset: str, reader: Any, context: Any
) -> Iterator[tuple[int, int, Future[int]]]:
    """Check the rows of an upload call and submit them, group by group.

    Yields:
        Three values for each message: its number, its number of rows, and the future of its commit.
        The messages of a group (see `GroupHeader`) have the same future. They are yielded once all
        rows of the group have arrived.

    Raises:
        InvalidCommandError: Rows are damaged, a header is malformed, or the call ends within a
            group. None of an incomplete group's rows is stored.
        BatchTooLargeError: A group is larger than `MAX_GROUP_BYTES`.
        FletcherError: As in `Ingest.submit_rows`.
    """
    stream = CommitStream()
    group: list[pa.RecordBatch] = []
    number = 1  # of the group's first message; a Longbow also counts from 1
    num_rows = 0
    for chunk in reader:
        if chunk.data is None:
            continue
        batch = _checked_rows(chunk.data)
        header = _header(chunk.app_metadata)
        group.append(batch)
        num_rows += batch.num_rows
        if header.group_rows is not None and num_rows < header.group_rows:
            if sum(one.nbytes for one in group) > MAX_GROUP_BYTES:
                raise BatchTooLargeError(
                    f"a group of rows is over {MAX_GROUP_BYTES >> 20} MiB; send smaller groups"
                )
            continue
        rows = SubmittedRows(group, header.mode, header.group_rows is not None, stream)
        done = ingest.submit_rows(dataset, rows, context.is_cancelled)
        for batch_id, batch in enumerate(group, number):
            yield batch_id, batch.num_rows, done
        number, num_rows, group = number + len(group), 0, []
    if group and not context.is_cancelled():
        raise InvalidCommandError(
            f"the stream ended within a group: {num_rows} rows arrived, fewer than `group_rows` "
            "announced; none of them is stored, so send the group again",
            field="group_rows",
        )


def check_declared(store: LanceStore, dataset: str, schema: pa.Schema) -> None:
    """Check the schema of a call without rows.

    Longbow's clients ask by such a call before they send rows.

    Raises:
        RequestError: Rows of that schema would be refused.
    """
    rows = _checked_rows(
        pa.RecordBatch.from_arrays([pa.nulls(0, one) for one in schema.types], schema=schema)
    )
    stored = store.read_schema(dataset)
    if stored is not None:
        check_compatible(dataset, stored, as_stored(rows, stored).schema)


class AckWriter:
    """Writer of one call's acknowledgements, on one thread, in message order.

    Raises:
        OverloadedError: The thread cannot start.
    """

    def __init__(self, writer: Any) -> None:
        self.error: Exception | None = None
        self._writer = writer
        self._queue: queue.Queue[tuple[int, int, Future[int]] | None] = queue.Queue(MAX_UNREAD_ACKS)
        self._thread = start_thread("acks", self._loop)

    def queue_ack(self, batch_id: int, rows: int, done: Future[int]) -> None:
        """Queue the acknowledgement of a message with `rows` rows.

        Raises the error of an earlier message, if one failed.
        """
        if self.error is not None:
            raise self.error
        self._queue.put((batch_id, rows, done))

    def close(self) -> None:
        """Write all queued acknowledgements, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.error is not None:
                continue
            batch_id, rows, done = item
            try:
                done.result()
                self._write_ack({"status": "acked", "batch_id": batch_id, "rows": rows})
            except Exception as error:  # noqa: BLE001 - raised by the handler
                self.error = error
                if isinstance(error, FletcherError):
                    self._write_refusal(batch_id, error)

    def _write_refusal(self, batch_id: int, error: FletcherError) -> None:
        """Send an error to the client without the handler.

        The handler cannot raise the error while it is blocked in a read.
        """
        try:
            self._write_ack({"status": "error", "batch_id": batch_id, **error.to_dict()})
        except pa.ArrowException as gone:
            _log.info("the client of a refused batch is gone: %s", gone)

    def _write_ack(self, ack: dict[str, Any]) -> None:
        self._writer.write_metadata(msgspec.json.encode(ack))


def _checked_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows with decoded columns.

    Damaged arrays, and rows without the columns that a search needs, are refused.
    """
    try:
        batch.validate(full=True)
        for column in batch.columns:
            if pa.types.is_dictionary(column.type):
                column.dictionary.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowIndexError) as error:  # the latter of a bad view
        raise InvalidCommandError(f"the rows are damaged: {str(error)[:200]}") from None
    check_schema_text(batch.schema, metadata=True)
    names = batch.schema.names
    if len(set(names)) != len(names):
        raise ColumnTypeError("two columns have the same name", field="columns")
    for name in ("id", "vector"):
        if name not in names:
            raise UnknownColumnError(
                f"the rows have no column `{name}`, they have {', '.join(names)[:300]}",
                field=name,
                allowed=["id", "vector", "timestamp"],
            )
    batch = decode_columns(batch, MAX_GROUP_BYTES)
    id_type = batch.schema.field("id").type
    if not (pa.types.is_integer(id_type) or is_text(id_type)):
        raise ColumnTypeError(
            f"`id` is {id_type}, expected utf8 or an integer",
            field="id",
            allowed=["utf8", "int64", "uint64"],
        )
    check_vectors(batch)
    return batch


def _header(metadata: pa.Buffer | None) -> GroupHeader:
    """The group header in a message's metadata. Other metadata is ignored."""
    raw = metadata.to_pybytes() if metadata is not None else b""
    try:
        fields = msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not fields.keys() & {"group_rows", "mode"}:
        return GroupHeader()
    return decode_request(GroupHeader, raw, "the metadata of the rows")
