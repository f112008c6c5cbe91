"""Limits of a client's input, and of the row slices that batches are cut into."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fletcher.core.chunking import Chunking

# Bytes of a row's small columns.
COLUMN_BYTES = 256
MAX_SLICE_ROWS = 1024

# Largest batch that counts as interactive, unless the command sets a priority.
INTERACTIVE_ROWS = 32
INTERACTIVE_BYTES = 32 * 1024

# Bytes of memory for each token of a chunk. The tokenizer and the batch window hold 4 bytes each.
_TOKEN_BYTES = 8
# Most times that late chunking reads a token, because frames overlap. They overlap most if chunks
# are almost as large as frames.
_MAX_FRAMES = 4
# Bytes of the shortest sentence: a full stop and the space after it.
_MIN_SENTENCE_BYTES = 2
# Smallest `slice_bytes`. The overhead of smaller text parts exceeds the work for their text.
_MIN_PART_BYTES = 1024


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Limits of a call's input and of its row slices.

    Attributes:
        max_message_bytes: Largest decoded size of one RecordBatch.
        max_row_bytes: Most UTF-8 bytes of one text.
        slice_rows: Most rows of one row slice.
        slice_bytes: Most text bytes of one row slice. A longer text gets a slice for itself.
        table_values: Most values of a dictionary whose vectors are kept as a table. With a larger
            dictionary, each row slice embeds the values that it uses.
        bytes_per_row: Memory of a row's float32 vectors and small columns, in bytes.
        bytes_per_byte: Bytes of memory for each byte of text. Up to three copies of the text are in
            memory.
    """

    max_message_bytes: int
    max_row_bytes: int
    slice_rows: int
    slice_bytes: int
    table_values: int
    bytes_per_row: int
    bytes_per_byte: int = 3

    def for_float16(self) -> IntakeLimits:
        """Returns the limits for float16 vectors, with more rows in a slice."""
        bytes_per_row = max(0, self.bytes_per_row - COLUMN_BYTES) // 2 + COLUMN_BYTES
        slice_rows = self.slice_rows * self.bytes_per_row // bytes_per_row
        return replace(
            self,
            slice_rows=max(self.slice_rows, min(MAX_SLICE_ROWS, slice_rows)),
            bytes_per_row=bytes_per_row,
        )

    def for_chunks(self, chunking: Chunking, chunk_overhead: int) -> IntakeLimits:
        """Returns the limits for texts that are cut into chunks.

        Row slices become smaller, because a text may have one vector for every few bytes: each
        chunk has a vector, and a token may be a single byte.
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
