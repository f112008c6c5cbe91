"""Size of the batches in which LanceDB's rows are read."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

# Approximate size of a scanned batch; a column may be as wide as 64 Ki numbers.
SCAN_BATCH_BYTES = 2 << 20
# Rows of a scanned batch if rows have several vectors and take 1 to 100 KiB each.
LIST_SCAN_ROWS = 256


def in_batches(query: Any, schema: pa.Schema) -> pa.RecordBatchReader:
    """Rows of a LanceDB query of a table of this schema."""
    return query.to_batches(scan_rows(schema))


def scan_rows(schema: pa.Schema) -> int:
    """Number of rows of a batch, so that it has about SCAN_BATCH_BYTES."""
    kind = schema.field("vector").type if "vector" in schema.names else pa.null()
    if pa.types.is_list(kind):
        return LIST_SCAN_ROWS
    if not pa.types.is_fixed_size_list(kind):
        return 8192
    row_bytes = kind.list_size * kind.value_type.bit_width // 8 + 512
    return int(min(max(SCAN_BATCH_BYTES // row_bytes, 64), 8192))
