"""One upload call on a store server: rows in, checked and grouped; acknowledgements out."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.errors import (
    BatchTooLargeError,
    ColumnTypeError,
    FletcherError,
    InvalidCommandError,
    UnknownColumnError,
)
from fletcher.stores.base import WriteMode
from fletcher.storeserver.group_commit import CommitStream, Ingest

_log = logging.getLogger(__name__)

MAX_GROUP_BYTES = 512 << 20
# Acknowledgements that a client has not read; beyond it the server stops reading rows.
MAX_UNREAD_ACKS = 1024


class UploadCall:
    """One stream of rows: checked, grouped by what its client says, handed to the ingest."""

    def __init__(self, ingest: Ingest, dataset: str) -> None:
        self._ingest = ingest
        self._dataset = dataset
        self._stream = CommitStream()
        self._group: list[pa.RecordBatch] = []
        self._group_rows = 0

    def read(
        self, reader: flight.MetadataRecordBatchReader, context: flight.ServerCallContext
    ) -> Iterator[tuple[int, int, Future[int]]]:
        """Every message's number, its rows, and the future of its commit.

        Messages of a group (`{"group_rows": N, "mode": ...}` in their metadata) share one future
        and are given out when all N rows are there. A group that does not get whole is dropped.
        """
        waiting: list[tuple[int, int]] = []
        number = 0
        for chunk in reader:
            if chunk.data is None:
                continue
            batch = chunk.data
            _check_rows(batch)
            group_rows, mode = _group(chunk.app_metadata)
            self._group.append(batch)
            self._group_rows += batch.num_rows
            waiting.append((number, batch.num_rows))
            number += 1
            if group_rows is not None and self._group_rows < group_rows:
                if sum(one.nbytes for one in self._group) > MAX_GROUP_BYTES:
                    raise BatchTooLargeError(
                        f"a group of rows is over {MAX_GROUP_BYTES >> 20} MiB; send smaller groups"
                    )
                continue
            done = self._ingest.submit(
                self._dataset,
                self._group,
                mode=mode,
                whole=group_rows is not None,
                stream=self._stream,
                given_up=context.is_cancelled,
            )
            for batch_id, rows in waiting:
                yield batch_id, rows, done
            self._group, self._group_rows, waiting = [], 0, []
        if self._group and not context.is_cancelled():
            raise InvalidCommandError(
                f"the stream ended within a group: {self._group_rows} rows came of those that "
                "`group_rows` announced; none of them is stored",
                field="group_rows",
            )


class Acks:
    """Writes acknowledgements in order from a thread of its own, as commits end."""

    def __init__(self, writer: flight.MetadataRecordBatchWriter) -> None:
        self.error: Exception | None = None
        self._writer = writer
        self._queue: queue.Queue[tuple[int, int, Future[int]] | None] = queue.Queue(MAX_UNREAD_ACKS)
        self._thread = threading.Thread(target=self._loop, name="acks", daemon=True)
        self._thread.start()

    def put(self, batch_id: int, rows: int, done: Future[int]) -> None:
        """Promises an acknowledgement; raises what became of an earlier one."""
        if self.error is not None:
            raise self.error
        self._queue.put((batch_id, rows, done))

    def close(self) -> None:
        """Waits until all that was promised is written."""
        self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.error is not None:
                continue
            batch_id, rows, done = item
            try:
                done.result()
                self._write({"status": "acked", "batch_id": batch_id, "rows": rows})
            except Exception as error:  # noqa: BLE001 - raised by the handler
                self.error = error
                if isinstance(error, FletcherError):
                    # The handler may be blocked in a read; a client that waits for this
                    # acknowledgement has to hear of it now.
                    self._refuse(batch_id, error)

    def _refuse(self, batch_id: int, error: FletcherError) -> None:
        try:
            self._write({"status": "error", "batch_id": batch_id, **error.to_dict()})
        except pa.ArrowException as gone:
            _log.info("the client of a refused batch is gone: %s", gone)

    def _write(self, ack: dict[str, Any]) -> None:
        self._writer.write_metadata(json.dumps(ack).encode())


def _check_rows(batch: pa.RecordBatch) -> None:
    """Refuses rows that no search could find, and arrays that are not what they say."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InvalidCommandError(f"the rows are damaged: {str(error)[:200]}") from None
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
    id_type, vector_type = batch.schema.field("id").type, batch.schema.field("vector").type
    if not (pa.types.is_integer(id_type) or pa.types.is_string(id_type)):
        raise ColumnTypeError(
            f"`id` is {id_type}, expected utf8 or an integer",
            field="id",
            allowed=["utf8", "int64", "uint64"],
        )
    if not pa.types.is_fixed_size_list(vector_type):
        raise ColumnTypeError(
            f"`vector` is {vector_type}, expected a fixed size list of numbers", field="vector"
        )
    if "batch_key" in names and not pa.types.is_string(batch.schema.field("batch_key").type):
        raise ColumnTypeError("`batch_key` is no utf8", field="batch_key")


def _group(metadata: pa.Buffer | None) -> tuple[int | None, WriteMode]:
    """(rows of the group that a message belongs to, mode) of a message's metadata."""
    if metadata is None or not metadata.size:
        return None, "append"
    try:
        fields = json.loads(metadata.to_pybytes())
    except (ValueError, RecursionError):
        fields = None
    # Longbow reads no metadata, so what is not ours means nothing.
    if not isinstance(fields, dict):
        return None, "append"
    rows, mode = fields.get("group_rows"), fields.get("mode", "append")
    if mode not in ("append", "upsert", "overwrite"):
        raise InvalidCommandError(
            f"`mode` is {str(mode)[:100]!r}",
            field="mode",
            allowed=["append", "upsert", "overwrite"],
        )
    return (rows if type(rows) is int and rows >= 0 else None), mode
