"""The payload of the pipeline: some rows of a client's batch, and the texts to embed for them."""

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
        batch_id: The client's number for the batch, or its position in the call; None: it is of
            none, but of the call's end.
        row_first: Offset of the first row in the upload.
        rows: The used columns of these rows.
        texts: Texts to embed for the first time, each once.
        values: int32 [num_rows], which vector of the table a row takes, -1 for none.
        timestamp_ns: When the batch was received, ns since the epoch.
        num_bytes: Memory that it will hold at most on its way.
        priority: Its class.
        last: It ends its batch.
        part: Of a long text that is cut into chunks, which part; the texts say whether more follow.
        errors: By row in the piece, why it has no vector.
        skipped: int64 [n], rows in the piece that were not wanted: they have no vector, and no
            error.
        new_values: int32 [num_texts], places of the vectors of `texts` in a table that pieces
            share; None: the table is these vectors.
        new_table: Vectors of a shared table that begins with this piece; None: it goes on.
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
