"""Assembly of output batches for documents that span several input rows.

Each output row is a chunk.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fletcher.core.batches import EmbeddingBatch, Int64Array
from fletcher.core.schema import VectorSpec
from fletcher.errors import FletcherError, RowTooLargeError
from fletcher.pipeline.assembly import Output
from fletcher.pipeline.chunk_assembly import ChunkAssembler
from fletcher.pipeline.input.row_slice import RowSlice

# Most bytes of text that are kept for one chunk. A chunk of 1,000 tokens usually has about 5 kB,
# but white space has no tokens, so a chunk may have any number of bytes.
MAX_CHUNK_TEXT_BYTES = 1 << 20


class DocumentAssembler(ChunkAssembler):
    """Assembles one call's output batches, with a row for each chunk of a document.

    If output rows have their chunk's text, the assembler keeps a document's text from the start of
    its latest chunk on.

    Args:
        max_text_bytes: Most bytes of text that are kept for one chunk.
    """

    def __init__(
        self,
        schema: pa.Schema,
        spec: VectorSpec,
        upload_id: str,
        *,
        max_text_bytes: int = MAX_CHUNK_TEXT_BYTES,
    ) -> None:
        super().__init__(schema, spec, upload_id, whole_rows=False)
        self._max_text_bytes = max_text_bytes
        self._kept_text = b""
        self._dropped_bytes = 0  # of the document, before the kept text

    def assemble(
        self, row_slice: RowSlice, outcome: EmbeddingBatch | FletcherError
    ) -> Output | None:
        if "text" not in self.schema.names or not row_slice.texts.num_texts:
            return super().assemble(row_slice, outcome)
        if row_slice.part == 0:
            self._kept_text, self._dropped_bytes = b"", 0
        if len(self._kept_text) > self._max_text_bytes:
            outcome = RowTooLargeError(
                f"`text` has more than {self._max_text_bytes} bytes in one chunk, expected fewer; "
                "send less white space, or leave `include_text` out",
                field="text",
                allowed=[f"<= {self._max_text_bytes} bytes a chunk"],
            )
        if not self._lost or row_slice.part == 0:
            self._kept_text += row_slice.texts.data
        output = super().assemble(row_slice, outcome)
        if isinstance(outcome, EmbeddingBatch) and outcome.chunks is not None:
            # The next chunk begins after the start of the last one.
            for first in outcome.chunks.text_ranges[-1:, 2].tolist():
                self._kept_text = self._kept_text[first - self._dropped_bytes :]
                self._dropped_bytes = first
        return output

    def _source(
        self,
        row_slice: RowSlice,  # noqa: ARG002 - the text may be an earlier slice's
        rows: Int64Array,
    ) -> tuple[memoryview, Int64Array]:
        return memoryview(self._kept_text), np.full(len(rows), -self._dropped_bytes)
