"""Size of Flight messages, and batches cut to a size."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

# Bytes of a message beside its batch and its metadata, rounded up.
OVERHEAD_BYTES = 256


def batch_bytes(batch: pa.RecordBatch) -> int:
    """Size of a batch in a message, in bytes.

    It is uncompressed, and without dictionaries, which are sent once.
    """
    return int(pa.ipc.get_record_batch_size(batch))


def cut_batch(batch: pa.RecordBatch, max_bytes: int) -> Iterator[pa.RecordBatch]:
    """Cut a batch into slices of at most `max_bytes`; at least one.

    A larger row is one slice.
    """
    if batch.num_rows <= 1 or batch_bytes(batch) <= max_bytes:
        yield batch
        return
    # Halves instead of equal slices, as rows differ in size.
    middle = batch.num_rows // 2
    yield from cut_batch(batch.slice(0, middle), max_bytes)
    yield from cut_batch(batch.slice(middle), max_bytes)
