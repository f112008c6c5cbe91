"""How much is taken in at once, and how large the pieces are that it is cut into."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fletcher.core.chunking import Chunking

# The small columns of a row together, and rows that a piece has at most.
COLUMN_BYTES = 256
MAX_SLICE_ROWS = 1024

# A batch of no more is interactive, where the command says nothing else.
INTERACTIVE_ROWS = 32
INTERACTIVE_BYTES = 32 * 1024

# A chunk's tokens are here twice, 4 bytes each: as they come from a tokenizer and in a window.
_TOKEN_BYTES = 8
# Of late chunks, how often a token is read: frames overlap, most where chunks are nearly as large.
_MAX_FRAMES = 4
# A mark that ends it and the space behind.
_MIN_SENTENCE_BYTES = 2
# Less is more work for each part than for its texts.
_MIN_PART_BYTES = 1024


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Bounds on what is taken in, and on the pieces it is cut into.

    Attributes:
        max_message_bytes: Decoded size of one RecordBatch.
        max_row_bytes: UTF-8 bytes of one text.
        piece_rows: Rows of one piece.
        piece_bytes: Text bytes of one piece; a single longer text makes its own piece.
        table_values: Distinct dictionary values whose vectors are kept for a whole dictionary;
            larger dictionaries are looked up piece by piece.
        bytes_per_row: What a row's vectors, in float32, and small columns hold while in the house.
        bytes_per_byte: What a byte of text holds: it is there up to three times.
    """

    max_message_bytes: int
    max_row_bytes: int
    slice_rows: int
    slice_bytes: int
    table_values: int
    bytes_per_row: int
    bytes_per_byte: int = 3

    def for_float16(self) -> IntakeLimits:
        """The same for vectors that are float16 on their whole way: more of them fit a piece."""
        bytes_per_row = max(0, self.bytes_per_row - COLUMN_BYTES) // 2 + COLUMN_BYTES
        slice_rows = self.slice_rows * self.bytes_per_row // bytes_per_row
        return dataclasses.replace(
            self,
            slice_rows=max(self.slice_rows, min(MAX_SLICE_ROWS, slice_rows)),
            bytes_per_row=bytes_per_row,
        )

    def for_chunks(self, chunking: Chunking, taken: int) -> IntakeLimits:
        """The same where texts are cut into chunks: a token has a byte at least, a chunk is a row.

        Pieces become smaller, so that the vectors of their chunks take no more than those of rows.
        `taken` are each chunk's tokens that are not the text's.
        """
        stride = max(1, chunking.size - taken - chunking.overlap)
        if chunking.alone:
            stride = min(stride, _MIN_SENTENCE_BYTES)
        num_tokens = (stride + chunking.overlap + taken) * (_MAX_FRAMES if chunking.late else 1)
        per_byte = -(-(self.bytes_per_row + _TOKEN_BYTES * num_tokens) // stride)
        part_bytes = self.slice_rows * self.bytes_per_row // per_byte
        return dataclasses.replace(
            self,
            slice_bytes=max(_MIN_PART_BYTES, min(self.slice_bytes, part_bytes)),
            bytes_per_byte=self.bytes_per_byte + per_byte,
        )
