"""Payload of the pipeline: rows of a client's batch, and their texts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from fletcher.core.batches import Int32Array, Int64Array, Priority, TextBatch
from fletcher.errors import FletcherError


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Consecutive rows of one batch.

    Attributes:
        batch_id: The client's number of the batch, or its position in the call; None: the slice
            belongs to the call's end, not to a batch.
        row_first: Offset of the first row in the upload.
        rows: Used columns of these rows.
        texts: Texts to embed, each once.
        values: int32 [num_rows], index of each row's vector in the table; -1 for none.
        timestamp_ns: When the batch was received, ns since the epoch.
        num_bytes: Most memory that the slice holds in the pipeline.
        priority: Whether it overtakes bulk work.
        last: Whether it ends its batch.
        part: Index of the text part, for a long text in chunks; `texts` says whether more follow.
        errors: Errors by row of the slice.
        skipped: int64 [n], rows of the slice that need no vector, and have no error.
        new_values: int32 [num_texts], indices of the vectors of `texts` in a table that slices
            share; None: the vectors are the table.
        new_table: Size of a shared table that begins with this slice; None: the table continues.
    """

    batch_id: int | None
    row_first: int
    rows: pa.RecordBatch
    texts: TextBatch
    values: Int32Array
    timestamp_ns: int
    num_bytes: int
    priority: Priority
    last: bool = True
    part: int = 0
    errors: dict[int, FletcherError] = field(default_factory=dict)
    skipped: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    new_values: Int32Array | None = None
    new_table: int | None = None

    @property
    def num_rows(self) -> int:
        return int(self.rows.num_rows)
