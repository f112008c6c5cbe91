"""Dataset writers of a Flight store: one for `fletcher store`, one for Longbow."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import pyarrow as pa

from fletcher.stores import protocol
from fletcher.stores.base import Comparison, DatasetWriter, Filters, WriteMode
from fletcher.stores.flight.connection import FlightConnection
from fletcher.stores.flight.longbow import longbow_batch, without_stored
from fletcher.stores.flight.transfer import NotIngestError, exchange_rows, put_rows
from fletcher.stores.schemas import check_compatible, conform_batch, num_group_rows

_log = logging.getLogger(__name__)


class FlightWriter(DatasetWriter):
    """Writer to a Flight store. Every append is a separate call. One thread owns it.

    `schema` is the schema of the rows that are sent.
    """

    def __init__(self, connection: FlightConnection, dataset: str, schema: pa.Schema) -> None:
        self._connection = connection
        self._dataset = dataset
        self._schema = schema

    def close(self) -> None:
        """Nothing to do."""


class FletcherWriter(FlightWriter):
    """Writer to `fletcher store`.

    Each append is sent as one group. The server commits all rows of the group or none.
    """

    def __init__(
        self, connection: FlightConnection, dataset: str, schema: pa.Schema, mode: WriteMode
    ) -> None:
        super().__init__(connection, dataset, schema)
        self._mode: WriteMode = mode

    def create_dataset(self) -> None:
        """Create the dataset; the server checks the schema.

        Raises:
            RequestError: The dataset does not take rows of this schema.
            StoreUnavailableError: The store does not answer.
        """
        self._send_group(pa.RecordBatch.from_pylist([], schema=self._schema))

    def append(self, batches: Sequence[pa.RecordBatch]) -> bool:
        for batch in batches:
            check_compatible(self._dataset, self._schema, batch.schema)
        rows = [conform_batch(batch, self._schema) for batch in batches if batch.num_rows]
        if rows:
            self._send_group(pa.concat_batches(rows))
        return False

    def missing_keys(self, batch_keys: Sequence[str]) -> list[str]:
        request = protocol.MissingKeysRequest(self._dataset, list(batch_keys))
        answer = self._connection.ask(protocol.MISSING_KEYS, request, protocol.MissingKeysAnswer)
        return answer.missing

    def _send_group(self, rows: pa.RecordBatch) -> None:
        header = msgspec.json.encode(protocol.GroupHeader(rows.num_rows, self._mode))
        exchange_rows(self._connection, self._dataset, rows, header)


class LongbowWriter(FlightWriter):
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
        super().__init__(connection, dataset, schema)
        self._count_keys = count_keys
        self._stored: Counter[str] = Counter()
        self._use_put = False
        self._exchange_proven = False

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
