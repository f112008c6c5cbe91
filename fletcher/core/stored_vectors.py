"""Vectors that a store has, for rows that are not embedded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fletcher.core.batches import BoolArray, Int64Array


@dataclass(frozen=True, slots=True)
class StoredVectors:
    """Stored vectors of some rows, whose texts need not be embedded."""

    rows: Int64Array  # [n], indices of the rows, ascending
    # [n], the output columns that depend on the text alone, such as `vector`.
    columns: pa.RecordBatch

    def among(self, wanted: BoolArray) -> StoredVectors:
        """The vectors of the rows that are True in `wanted`, bool [num_rows]."""
        keep = wanted[self.rows]
        return StoredVectors(self.rows[keep], self.columns.filter(pa.array(keep)))

    def fill(self, columns: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
        """Stored columns, extended to all rows with the other rows' values in `columns`."""
        filled = {}
        for name, stored in zip(self.columns.schema.names, self.columns.columns, strict=True):
            own = columns[name]
            places = np.arange(len(own))
            places[self.rows] = len(own) + np.arange(len(stored))
            filled[name] = pa.concat_arrays([own, stored]).take(pa.array(places))
        return filled
