"""Row slice: rows of a client's batch that travel through the pipeline together."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from fletcher.core.batches import Int32Array, Int64Array, Priority, TextBatch
from fletcher.core.stored_vectors import StoredVectors
from fletcher.errors import FletcherError


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Consecutive rows of one batch.

    Attributes:
        batch_id: The client's number of the batch, or its position in the call. None: the slice
            was made at the end of the call and belongs to no batch.
        row_first: Offset of the first row in the upload.
        rows: Used columns of the rows.
        texts: Texts to embed, without repetitions.
        values: int32 [num_rows], index of each row's vector in a table of vectors (`new_values`);
            -1 for rows without a vector.
        timestamp_us: When the batch was received, in microseconds since the epoch.
        num_bytes: Most memory that the slice holds in the pipeline.
        priority: Whether the slice is interactive, and overtakes bulk work, or bulk work.
        last: Whether this is the last slice of its batch.
        part: Index of the text part, if the slice is a part of a long text in chunks. Whether more
            parts follow is in `texts.continued`.
        errors: Errors of failed rows, by the row's index in the slice.
        skipped: int64 [n], indices of rows in the slice that need no vector and have no error.
        stored: Vectors of rows that are not embedded, because the store has them.
        new_values: int32 [num_texts], indices of the vectors of `texts` in a table that several
            slices share. None: the table consists of the vectors of `texts` alone.
        new_table: Number of vectors in the shared table, if a new table begins with this slice.
            None: the slice uses the table of the slices before it, or no shared table.
    """

    batch_id: int | None
    row_first: int
    rows: pa.RecordBatch
    texts: TextBatch
    values: Int32Array
    timestamp_us: int
    num_bytes: int
    priority: Priority
    last: bool = True
    part: int = 0
    errors: dict[int, FletcherError] = field(default_factory=dict)
    skipped: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    stored: StoredVectors | None = None
    new_values: Int32Array | None = None
    new_table: int | None = None

    @property
    def num_rows(self) -> int:
        return int(self.rows.num_rows)
