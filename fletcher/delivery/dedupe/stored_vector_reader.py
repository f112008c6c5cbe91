"""Vectors of unchanged texts, read from the store instead of embedded again.

A delta upload may send a stored text with other carried columns. The row is then written anew, with
the vector that the store has for the text. Such a vector stays valid, whatever happens to the row
meanwhile. It depends only on the text, the model and the settings in the dataset's schema metadata,
and the reader compares all of these. In any doubt, or if the store cannot be read, the text is
embedded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.core.quantization import QUANTIZATION
from fletcher.core.stored_vectors import StoredVectors
from fletcher.delivery.groups import Destination
from fletcher.errors import UnknownDatasetError
from fletcher.stores.base import Comparison
from fletcher.stores.schemas import has_chunks

log = logging.getLogger(__name__)

# Output columns that depend on the text alone.
_TEXT_COLUMNS = ("vector", "scale", "token_count", "truncated")
# Limit of the stored rows that are read for each id. Appended rows may repeat an id any number of
# times.
_ROWS_PER_ID = 10


class StoredVectorReader:
    """Reads vectors of a dataset for the rows of one connection. Not thread-safe.

    After a failure the reader reads no more, so that a failing store does not delay all row slices.

    Args:
        output: Schema of the connection's output columns.
    """

    def __init__(self, destination: Destination, output: pa.Schema) -> None:
        self._destination = destination
        self._output = output
        self._columns = [name for name in _TEXT_COLUMNS if name in output.names]
        # The chunks of a text are several rows, which only together stand for the text.
        self._usable = not has_chunks(output)

    def read_vectors(self, rows: pa.RecordBatch, places: Sequence[int]) -> StoredVectors | None:
        """Stored vectors for the rows at `places`; None if the store has none.

        Never raises.
        `rows` has the columns `id` and `text`. A row gets the vector of a stored row with the same
        id and the same text.
        """
        held = self._destination.breaker.held_since(self._destination.dataset) is not None
        if not places or not self._usable or held:
            return None
        chosen = rows.select(["id", "text"]).take(pa.array(places, pa.int64()))
        wanted: dict[tuple[Any, str], list[int]] = {}
        keys = zip(*(column.to_pylist() for column in chosen.columns), strict=True)
        for place, key in zip(places, keys, strict=True):
            wanted.setdefault(key, []).append(place)
        try:
            return self._read(wanted)
        except UnknownDatasetError:  # all rows of the dataset are still in the journal
            return None
        except Exception:
            self._usable = False
            log.warning(
                "`%s`: stored vectors cannot be read; the texts are embedded again",
                self._destination.dataset,
                exc_info=True,
            )
            return None

    def _read(self, wanted: dict[tuple[Any, str], list[int]]) -> StoredVectors | None:
        ids = sorted({one for one, _ in wanted})
        found_rows: list[int] = []
        found: list[pa.RecordBatch] = []
        for batch in self._scan(ids):
            taken: list[int] = []
            keys = zip(*(batch.column(name).to_pylist() for name in ("id", "text")), strict=True)
            usable = _is_usable(batch, self._columns)
            for index, (key, good) in enumerate(zip(keys, usable, strict=True)):
                if good and key in wanted:
                    places = wanted.pop(key)  # another row with this text has the same vector
                    found_rows += places
                    taken += [index] * len(places)
            if taken:
                found.append(batch.select(self._columns).take(pa.array(taken)))
            if not wanted:
                break
        if not found:
            return None
        fields = [self._output.field(name) for name in self._columns]
        table = pa.Table.from_batches(found).cast(pa.schema(fields))
        order = np.argsort(found_rows)
        columns = table.take(pa.array(order)).combine_chunks().to_batches()[0]
        return StoredVectors(np.array(found_rows, np.int64)[order], columns)

    def _scan(self, ids: list[Any]) -> Iterator[pa.RecordBatch]:
        """Rows with these ids; none if the dataset has vectors of another kind."""
        store, dataset = self._destination.store, self._destination.dataset
        columns = ["id", "text", *self._columns]
        same = [Comparison("id", "in", ids)]
        limit = _ROWS_PER_ID * len(ids)
        reader = store.scan(dataset, columns=columns, filters=same, limit=limit)
        if _describes_same_vectors(reader.schema, self._output):
            yield from reader
        else:
            self._usable = False


def _describes_same_vectors(stored: pa.Schema, output: pa.Schema) -> bool:
    """Whether equal texts have equal vectors in both schemas."""
    have, want = stored.metadata or {}, output.metadata or {}
    same = all(have.get(key) == value for key, value in want.items())
    same = same and (QUANTIZATION.encode() in have) == (QUANTIZATION.encode() in want)
    return same and stored.field("vector").type == output.field("vector").type


def _is_usable(batch: pa.RecordBatch, columns: Sequence[str]) -> list[bool]:
    """Whether each row has all columns, a finite vector, and a text that was not cut.

    A dataset does not say which end of a cut text was cut, and the vector depends on that.
    """
    usable = pc.invert(batch.column("truncated").fill_null(True))
    for name in columns:
        usable = pc.and_(usable, batch.column(name).is_valid())
    vectors = batch.column("vector").filter(usable)
    if not _all_finite(vectors):
        return [False] * batch.num_rows
    return list(usable.to_pylist())


def _all_finite(values: pa.Array) -> bool:
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    if pa.types.is_struct(values.type):
        values = values.field("value")
    if not pa.types.is_floating(values.type):
        return True
    return bool(np.isfinite(values.to_numpy(zero_copy_only=False)).all())
