"""Writer of a dataset of a Longbow."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import pyarrow as pa

from fletcher.stores.base import Comparison, DatasetWriter, Filters
from fletcher.stores.flight.connection import FlightConnection
from fletcher.stores.flight.exclusive import lock_dataset
from fletcher.stores.flight.longbow import longbow_batch, without_stored
from fletcher.stores.flight.transfer import NotIngestError, exchange_rows, put_rows
from fletcher.stores.schemas import num_group_rows

_log = logging.getLogger(__name__)


class LongbowWriter(DatasetWriter):
    """Writer to a Longbow, where the first append creates the dataset.

    Rows are sent by Longbow's acknowledged DoExchange, or by DoPut if the store lacks that call. If
    rows are sent twice, Longbow stores them twice. After a send with unknown outcome,
    `missing_keys` therefore counts the stored rows of each key. The next `append` of such a key
    sends only the missing rows.

    `schema` comes from `longbow_schema`. `count_keys` takes a dataset and filters, and returns the
    number of stored rows per batch key, among rows that meet the filters.
    """

    def __init__(
        self,
        connection: FlightConnection,
        dataset: str,
        schema: pa.Schema,
        count_keys: Callable[[str, Filters], Counter[str]],
    ) -> None:
        self._connection = connection
        self._dataset = dataset
        self._schema = schema
        self._count_keys = count_keys
        self._stored: Counter[str] = Counter()
        self._use_put = False
        self._exchange_proven = False
        self._lock = lock_dataset(connection.address.data, dataset)

    def append(self, batches: Sequence[pa.RecordBatch]) -> bool:
        """See `DatasetWriter.append`. A failure may leave a group partly stored."""
        stored = self._stored.copy()
        rows = [
            longbow_batch(without_stored(batch, stored), self._schema)
            for batch in batches
            if batch.num_rows
        ]
        rows = [batch for batch in rows if batch.num_rows]
        slow_down = bool(rows) and self._send_rows(pa.concat_batches(rows))
        for batch in batches:
            for key in batch.column("batch_key").unique().to_pylist() if self._stored else ():
                self._stored.pop(key, None)
        return slow_down

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        """See `DatasetWriter.missing_keys`. Reads the rows back, one call per key."""
        missing = []
        for key in batch_keys:
            counts = self._count_keys(self._dataset, [Comparison("batch_key", "=", key)])
            # Rows without a vector were never sent, so a complete group may have fewer rows than
            # its key says. The group then counts as missing, and its next append sends nothing.
            num_rows = num_group_rows(key)
            if not num_rows or counts[key] < num_rows:
                self._stored[key] = counts[key]
                missing.append(key)
        return missing

    def close(self) -> None:
        """Release the dataset's lock."""
        self._lock.release()

    def _send_rows(self, rows: pa.RecordBatch) -> bool:
        if not self._use_put:
            try:
                first = not self._exchange_proven
                exchange_rows(self._connection, self._dataset, rows, None, await_first=first)
            except NotIngestError:
                _log.info("the store has no acknowledged ingest; sending rows by DoPut")
                self._use_put = True
            else:
                self._exchange_proven = True
                return False
        return put_rows(self._connection, self._dataset, rows)
