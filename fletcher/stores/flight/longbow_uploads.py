"""Rows of uploads that a Longbow has, by their batch keys.

A Longbow loses rows by messages: of each message, it has all rows or none. `LongbowWriter` gives
each message keys that no other message has, so a key has all its rows or none. Earlier releases
sent a group in several messages under one key, and may have left a part of it. Rows of such a part
are recognized by their values.

Filtered reads are enough unless other clients have written to the dataset, see `OtherRows`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.core.batches import BoolArray, Int64Array
from fletcher.core.ranges import RangeSet
from fletcher.core.schema import parse_batch_key
from fletcher.errors import UnknownDatasetError
from fletcher.stores.base import Comparison
from fletcher.stores.filters import to_json
from fletcher.stores.flight.connection import FlightConnection, store_call
from fletcher.stores.flight.other_rows import OtherRows
from fletcher.stores.flight.running_time import RunningTime
from fletcher.stores.schemas import count_batch_keys

# Columns in which a row that is sent again may differ.
_VARYING = ("vector", "timestamp", "batch_key")


class UploadRows:
    """Rows of one upload that a Longbow has. Not thread-safe.

    Attributes:
        whole: Offsets of stored rows, as far as keys tell them.
        parts: Values of the stored rows of each key with missing rows, by the key's first and last
            row.
        num_rows: Number of stored rows.
    """

    def __init__(self, counts: dict[tuple[int, int], int]) -> None:
        self.num_rows = sum(counts.values())
        sizes = {key: key[1] - key[0] + 1 for key in counts}
        self.whole = RangeSet(key for key, count in counts.items() if count >= sizes[key])
        self.parts: dict[tuple[int, int], Counter[str]] = {}
        for (first, last), count in counts.items():
            gaps = self.whole.missing(first, last)
            if count >= sum(gap[1] - gap[0] + 1 for gap in gaps):  # other keys have the rest
                self.whole.add_range(first, last)
            else:
                self.parts[first, last] = Counter()

    def find_missing(self, rows: pa.RecordBatch, offsets: Int64Array) -> BoolArray:
        """Mask of the rows that are not stored. A stored row of a part is found only once."""
        missing = np.array([not self.whole.covers(row, row) for row in offsets.tolist()], np.bool_)
        for (first, last), stored in self.parts.items():
            places = np.flatnonzero(missing & (offsets >= first) & (offsets <= last))
            texts = row_texts(rows.take(pa.array(places)))
            for place, text in zip(places.tolist(), texts, strict=True):
                if stored[text]:
                    stored[text] -= 1
                    missing[place] = False
        return missing


class LongbowUploads:
    """Questions about the uploads in a Longbow. Thread-safe.

    Args:
        count_rows: See `OtherRows`.

    Attributes:
        running_time: Waits until rows on their way have arrived.
        other_rows: Rows of other clients, as far as is known.
    """

    def __init__(
        self, connection: FlightConnection, count_rows: Callable[[str], int | None]
    ) -> None:
        self._connection = connection
        self.other_rows = OtherRows(count_rows)
        self.running_time = RunningTime(lambda: connection.run_action("check_readiness", {}))
        # Uploads with parts, by dataset and upload id. There are few, and only of earlier releases.
        self._with_parts: dict[tuple[str, str], UploadRows] = {}

    def read_rows(self, dataset: str, upload_id: str) -> UploadRows:
        """Ask which rows of an upload a dataset has.

        Raises:
            FletcherError: The store does not answer.
        """
        self.running_time.wait_after_failure()
        # All keys of the upload are between these two, and so are keys of uploads with a longer
        # name.
        low, high = f"{upload_id}:", f"{upload_id};"
        counts = self._count(dataset, low, high, count_batch_keys)
        parsed = {key: parse_batch_key(key) for key in counts}
        own = {key: one[1:] for key, one in parsed.items() if one and one[0] == upload_id}
        rows = UploadRows({own[key]: counts[key] for key in own})
        for key, place in own.items():
            if place in rows.parts:
                rows.parts[place] = self._count(dataset, key, key, row_texts)
        self._with_parts.pop((dataset, upload_id), None)
        if rows.parts:
            self._with_parts[dataset, upload_id] = rows
        return rows

    def known_parts(self, dataset: str, upload_id: str) -> UploadRows | None:
        """The last answer about an upload if some of its keys had missing rows."""
        return self._with_parts.get((dataset, upload_id))

    def _count(
        self,
        dataset: str,
        low: str,
        high: str,
        content: Callable[[pa.RecordBatch], Mapping[str, int] | list[str]],
    ) -> Counter[str]:
        """Count the content of rows whose keys are not below `low` and not above `high`.

        A filtered read is enough unless other clients have written to the dataset. It also has
        deleted rows, which a whole read lacks. They count, because a Longbow brings them back.
        """
        bounds = (Comparison("batch_key", ">=", low), Comparison("batch_key", "<=", high))
        found: Counter[str] = Counter()
        for batch in self._read(dataset, {"filters": to_json(bounds)}):
            found.update(content(batch))
        if not self.other_rows.has_none(dataset):
            all_found: Counter[str] = Counter()
            for batch in self.other_rows.watch(dataset, self._read(dataset, {})):
                if "batch_key" in batch.schema.names:
                    keys = batch["batch_key"]
                    is_met = pc.and_(pc.greater_equal(keys, low), pc.less_equal(keys, high))
                    all_found.update(content(batch.filter(is_met)))
            found |= all_found
        return found

    def _read(self, dataset: str, ticket: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        what = f"asking what dataset `{dataset}` holds"
        with suppress(UnknownDatasetError), store_call(what):
            yield from self._connection.open_stream(dataset, ticket, what)


def row_offsets(batch: pa.RecordBatch) -> tuple[str, Int64Array] | None:
    """Upload and offsets of a group's rows; None if its keys do not tell them."""
    offsets: list[Int64Array] = []
    uploads = set()
    for key, count in count_batch_keys(batch).items():
        parsed = parse_batch_key(key)
        if parsed is None or parsed[2] - parsed[1] + 1 != count:
            return None
        uploads.add(parsed[0])
        offsets.append(np.arange(parsed[1], parsed[2] + 1))
    return (uploads.pop(), np.concatenate(offsets)) if len(uploads) == 1 else None


def row_texts(rows: pa.RecordBatch) -> list[str]:
    """Values of each row as a text, for comparison, without those that may differ."""
    names = [
        field.name
        for field in rows.schema
        if field.name not in _VARYING and not pa.types.is_nested(field.type)
    ]
    columns = [_texts(rows.column(name)) for name in sorted(names)]
    return [repr(values) for values in zip(*columns, strict=True)]


def _texts(column: pa.Array) -> list[object]:
    kind = column.type
    if pa.types.is_temporal(kind):  # nanoseconds have no Python type
        return list(column.cast(pa.int64() if kind.bit_width == 64 else pa.int32()).to_pylist())
    return list(column.to_pylist())
