"""Writer of a dataset of a Longbow."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fletcher.core.batches import Int64Array
from fletcher.core.schema import parse_batch_key, row_keys
from fletcher.errors import InternalError, RequestError, StoreUnavailableError
from fletcher.stores.base import Appended, DatasetWriter, Unconfirmed
from fletcher.stores.flight.connection import FlightConnection
from fletcher.stores.flight.exclusive import lock_dataset
from fletcher.stores.flight.longbow import longbow_batch
from fletcher.stores.flight.longbow_uploads import LongbowUploads, UploadRows, row_offsets
from fletcher.stores.flight.running_time import CONFIRM_S, RunningTime
from fletcher.stores.flight.transfer import (
    IngestCall,
    NotIngestError,
    cut_rows,
    exchange_rows,
    put_rows,
)

_log = logging.getLogger(__name__)


class _Rows(NamedTuple):
    """Rows of one upload, with their offsets."""

    upload_id: str
    offsets: Int64Array
    batch: pa.RecordBatch


class UnconfirmedRows(Unconfirmed):
    """Rows that a Longbow acknowledged, and the open call that sent them.

    If the Longbow's process ends, the call breaks. Nothing else would show it, because a new
    process answers later calls as if nothing had happened.
    """

    def __init__(self, call: IngestCall, running_time: RunningTime) -> None:
        self.ready_at = time.monotonic() + CONFIRM_S
        self._call = call
        self._running_time = running_time
        self._has_run = running_time.start_wait()

    def confirm(self) -> None:
        """See `Unconfirmed.confirm`."""
        try:
            self._has_run.result()
            self._call.end()
        except BaseException:
            self._running_time.note_failure()
            raise


class LongbowWriter(DatasetWriter):
    """Writer to a Longbow. One thread owns it. The first append creates the dataset.

    Rows are sent by Longbow's acknowledged DoExchange. A store without that call gets the rows by
    DoPut, and is asked for them afterwards.

    If rows are sent twice, Longbow stores them twice. After a send with unknown outcome,
    `missing_keys` therefore asks for the stored rows of each upload. The next `append` sends only
    the others.

    `schema` comes from `longbow_schema`.
    """

    def __init__(
        self,
        connection: FlightConnection,
        dataset: str,
        schema: pa.Schema,
        uploads: LongbowUploads,
    ) -> None:
        self._connection = connection
        self._dataset = dataset
        self._schema = schema
        self._uploads = uploads
        self._stored: dict[str, UploadRows] = {}  # uploads with groups in doubt
        self._use_put = False
        self._exchange_proven = False
        self._lock = lock_dataset(connection.address.data, dataset)

    def declare_columns(self) -> None:
        """Have the Longbow check the types of all columns, before the first row.

        The columns that it gives back are those of a dataset's first rows. It knows more: columns
        of later rows, and those that other writers declared.

        Raises:
            RequestError: A column has another type.
            StoreUnavailableError: The store does not answer.
        """
        put_rows(
            self._connection, self._dataset, [pa.RecordBatch.from_pylist([], schema=self._schema)]
        )

    def append(self, batches: Sequence[pa.RecordBatch]) -> Appended:
        """See `DatasetWriter.append`. A failure may leave a part of the rows stored."""
        rows = [self._missing_rows(batch) for batch in batches if batch.num_rows]
        rows = [one for one in rows if len(one.offsets)]
        try:
            return self._send_rows(rows) if rows else Appended()
        except RequestError:
            raise
        except BaseException:
            self._uploads.running_time.note_failure()
            raise

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        """See `DatasetWriter.missing_keys`. Reads the uploads' rows back.

        A group of which some rows were never sent counts as missing, and its next append sends
        nothing.
        """
        self._uploads.running_time.note_failure()
        self._stored = {}
        missing = []
        for key in batch_keys:
            parsed = parse_batch_key(key)
            if parsed is None or not self._read_upload(parsed[0]).whole.covers(*parsed[1:]):
                missing.append(key)
        return missing

    def close(self) -> None:
        """Release the dataset's lock."""
        self._lock.release()

    def _read_upload(self, upload_id: str) -> UploadRows:
        if upload_id not in self._stored:
            self._stored[upload_id] = self._uploads.read_rows(self._dataset, upload_id)
        return self._stored[upload_id]

    def _missing_rows(self, batch: pa.RecordBatch) -> _Rows:
        """Rows of a group that are not stored, as far as is known, in Longbow's types."""
        found = row_offsets(batch)
        if found is None:
            raise InternalError("the keys of a group do not name its rows")
        upload_id, offsets = found
        narrow = longbow_batch(batch, self._schema)
        known = self._uploads.known_parts(self._dataset, upload_id)
        stored = self._stored.get(upload_id, known)
        if stored is not None:
            missing = stored.find_missing(narrow, offsets)
            narrow, offsets = narrow.filter(pa.array(missing)), offsets[missing]
        return _Rows(upload_id, offsets, narrow)

    def _messages(self, rows: Sequence[_Rows]) -> Iterator[pa.RecordBatch]:
        """The rows in messages. The keys of a message name exactly its rows."""
        batch = pa.concat_batches([one.batch for one in rows])
        place = batch.schema.get_field_index("batch_key")
        uploads = np.repeat(np.arange(len(rows)), [len(one.offsets) for one in rows])
        offsets = np.concatenate([one.offsets for one in rows])
        first = 0
        for message in cut_rows(batch, self._connection.message_bytes):
            end = first + message.num_rows
            keys = [
                row_keys(rows[upload].upload_id, offsets[first:end][uploads[first:end] == upload])
                for upload in np.unique(uploads[first:end])
            ]
            yield message.set_column(place, self._schema.field(place), pa.concat_arrays(keys))
            first = end

    def _send_rows(self, rows: Sequence[_Rows]) -> Appended:
        messages = list(self._messages(rows))
        running_time = self._uploads.running_time
        if not self._use_put:
            try:
                call = exchange_rows(
                    self._connection,
                    self._dataset,
                    messages,
                    await_first=not self._exchange_proven,
                    held_s=2 * CONFIRM_S,
                )
            except NotIngestError:
                _log.info("the store has no acknowledged ingest; sending rows by DoPut")
                self._use_put = True
            else:
                self._exchange_proven = True
                num_rows = sum(message.num_rows for message in messages)
                self._uploads.other_rows.add_own(self._dataset, num_rows)
                return Appended(unconfirmed=UnconfirmedRows(call, running_time))
        slow_down = put_rows(self._connection, self._dataset, messages)
        running_time.note_failure()
        for one in rows:
            stored = self._uploads.read_rows(self._dataset, one.upload_id)
            if stored.find_missing(one.batch, one.offsets).any():
                raise StoreUnavailableError(
                    f"the store does not have all rows that were written to `{self._dataset}`",
                    field="dataset",
                )
        return Appended(slow_down=slow_down)
