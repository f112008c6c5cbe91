"""Limits of a client's input, and sizes of the row slices that it is cut into."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fletcher.core.chunking import Chunking

# Bytes of a row's small columns, and most rows of a row slice.
COLUMN_BYTES = 256
MAX_SLICE_ROWS = 1024

# Largest batch that is interactive unless the command says otherwise.
INTERACTIVE_ROWS = 32
INTERACTIVE_BYTES = 32 * 1024

# Bytes of a chunk's token: held twice, 4 bytes each, by the tokenizer and the batch window.
_TOKEN_BYTES = 8
# Times that late chunking reads a token: frames overlap, mostly if chunks are almost as large.
_MAX_FRAMES = 4
# A full stop and the space after it.
_MIN_SENTENCE_BYTES = 2
# Smaller parts cost more than the texts in them.
_MIN_PART_BYTES = 1024


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Limits of the input and of its row slices.

    Attributes:
        max_message_bytes: Largest decoded size of one RecordBatch.
        max_row_bytes: Most UTF-8 bytes of one text.
        slice_rows: Most rows of one row slice.
        slice_bytes: Most text bytes of one row slice; a longer text gets a slice for itself.
        table_values: Most distinct values of a dictionary whose vectors are kept as a table.
            Larger dictionaries are looked up for each row slice.
        bytes_per_row: Memory of a row's vectors, in float32, and of its small columns.
        bytes_per_byte: Memory of a byte of text, which is held up to three times.
    """

    max_message_bytes: int
    max_row_bytes: int
    slice_rows: int
    slice_bytes: int
    table_values: int
    bytes_per_row: int
    bytes_per_byte: int = 3

    def for_float16(self) -> IntakeLimits:
        """Returns the limits for vectors in float16: a slice holds more rows."""
        bytes_per_row = max(0, self.bytes_per_row - COLUMN_BYTES) // 2 + COLUMN_BYTES
        slice_rows = self.slice_rows * self.bytes_per_row // bytes_per_row
        return replace(
            self,
            slice_rows=max(self.slice_rows, min(MAX_SLICE_ROWS, slice_rows)),
            bytes_per_row=bytes_per_row,
        )

    def for_chunks(self, chunking: Chunking, chunk_overhead: int) -> IntakeLimits:
        """Returns the limits for texts that are cut into chunks.

        Row slices become smaller: a token has at least one byte, and each chunk has a vector.
        """
        stride = max(1, chunking.size - chunk_overhead - chunking.overlap)
        if chunking.alone:
            stride = min(stride, _MIN_SENTENCE_BYTES)
        num_frames = _MAX_FRAMES if chunking.late else 1
        num_tokens = num_frames * (stride + chunking.overlap + chunk_overhead)
        per_byte = -(-(self.bytes_per_row + _TOKEN_BYTES * num_tokens) // stride)
        part_bytes = self.slice_rows * self.bytes_per_row // per_byte
        return replace(
            self,
            slice_bytes=max(_MIN_PART_BYTES, min(self.slice_bytes, part_bytes)),
            bytes_per_byte=self.bytes_per_byte + per_byte,
        )
