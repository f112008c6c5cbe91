"""Data passed between pipeline stages: arrays over all rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from fletcher.core.chunking import Chunking
from fletcher.errors import FletcherError

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]
VectorArray = npt.NDArray[np.float32 | np.float16]

Truncate = Literal["end", "start", "error"]
Priority = Literal["bulk", "interactive"]


@dataclass(frozen=True, slots=True)
class Carry:
    """Tokenizer state from one part of a text to the next, for texts cut into chunks."""

    prompt_ids: Int32Array  # [n], prompt tokens of each chunk
    input_ids: Int32Array  # [n], tokens of the parts so far that the next chunks still need
    starts: Int64Array  # [n, 2], character and byte of the text where each of `input_ids` begins
    # [n], whether a sentence or paragraph begins with each of `input_ids`; values as in
    # `fletcher.tokenization.sentences`.
    levels: npt.NDArray[np.int8]
    end: str  # the text's last characters so far
    size: Int64Array  # [2], characters and bytes of the text so far
    num_chunks: int  # finished chunks of the text so far
    num_covered: int  # leading tokens of the next chunk that the last finished chunk has, too
    num_before: int = 0  # leading tokens of `input_ids` before the next chunk, only its context


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunks of a batch's texts, where each row of the batch is one chunk."""

    # [num_texts + 1]. The chunks of text i are the rows offsets[i] to offsets[i + 1] (exclusive). A
    # text part may have no rows.
    offsets: Int64Array
    index: Int32Array  # [num_rows], position of the chunk among the chunks of its text, from 0
    num_tokens: Int32Array  # [num_rows], tokens from the text, without prompt and special tokens
    # [num_rows, 4], each chunk's range of its text: first character, end character, first byte, end
    # byte. Ends are exclusive. Together the ranges of a text cover all of it. The array is zeros if
    # chunks do not become rows of the output.
    text_ranges: Int64Array
    # [num_rows], whether a paragraph or the text begins with the chunk. With the method `tokens`
    # paragraphs are not looked for.
    begins: BoolArray


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts for a tokenizer, in the layout of an Arrow string array."""

    data: bytes | memoryview  # UTF-8 bytes of all texts, one after the other
    offsets: Int64Array  # [num_texts + 1], byte positions in `data`; may not start at 0
    truncate: Truncate = "end"  # what to do with a text longer than `max_length` tokens
    prompt: str = ""  # inserted before every text; its tokens count as the text's
    # Longest text in tokens, including special tokens; None: the longest that the model reads.
    max_length: int | None = None
    chunking: Chunking | None = None  # cut texts so, one TokenBatch row per chunk; None: do not cut
    continued: bool = False  # the last text is incomplete: its next part is in the next batch
    carry: Carry | None = None  # state of the previous part, if the first text continues it
    layers: int = 0  # layer from which the vectors are taken; 0: the last
    half: bool = False  # return vectors in float16; False: in the type that the graph computes

    @property
    def num_texts(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, slots=True)
class Spans:
    """Token ranges that get one vector each, for late chunking."""

    counts: Int32Array  # [num_rows], number of spans in each row, at least one
    bounds: Int32Array  # [num_spans, 2], first and end token (exclusive) of each span in its row


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokenized texts, in one flat array of token ids.

    If texts are cut into chunks, each chunk counts as a text here.
    """

    input_ids: Int32Array  # [total_tokens], tokens of all texts, including special tokens
    offsets: Int64Array  # [num_texts + 1] into `input_ids`, from 0
    truncated: BoolArray  # [num_texts], whether tokens were cut off
    # Errors by text index. A text with an error has no tokens: it was too long for
    # truncate="error".
    errors: dict[int, FletcherError] = field(default_factory=dict)
    chunks: Chunks | None = None  # how chunks belong to texts; None: texts were not cut
    carry: Carry | None = None  # state for the next part of the last text
    # With late chunking, the span of a row that is each chunk; None: each chunk is a row.
    spans: Spans | None = None

    @property
    def num_texts(self) -> int:
        return len(self.offsets) - 1

    @property
    def token_count(self) -> Int32Array:
        """int32 [num_texts], number of tokens that the model reads for each text."""
        return np.diff(self.offsets).astype(np.int32)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Input of one run of the model: rows of similar length, without padding."""

    input_ids: Int32Array  # [total_tokens]
    lengths: Int32Array  # [num_rows], each at least 1
    layers: int = 0  # layer from which all vectors are taken; 0: the last
    spans: Spans | None = None  # return one vector per span; None: one per row
    half: bool = False  # return vectors in float16, which halves the transfer


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """A replica's answer to a MicroBatch."""

    # Pooled vectors: float32, or float16 if the MicroBatch sets `half`. The shape is
    # [num_rows, dim], or [num_vectors, width] for models with several vectors per row. Vectors are
    # L2-normalised if the bundle says so. If the MicroBatch has spans, the shape is
    # [num_spans, dim] and vectors are not normalised.
    embeddings: VectorArray
    norms: FloatArray | None  # [num_rows], L2 norms before normalisation; None: not normalised
    compute_s: float  # seconds that the device computed
    # Most tokens, padding included, that the replica accepts in one run from now on; 0: unknown.
    budget_tokens: int = 0
    # [num_rows], number of vectors of each row (`fletcher.vectors.ragged`); None: one per row or
    # span.
    counts: Int32Array | None = None
    # Errors of rows that the engine failed on, by the row's index. Their vectors have no meaning.
    errors: dict[int, FletcherError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EmbeddingBatch:
    """Vectors of one TextBatch, in the order of its texts."""

    # Without `counts`: [num_texts, dim], float32, or float16 if the TextBatch sets `half`. Texts in
    # `errors` have zeros. With `counts`: float32 [num_vectors, width].
    embeddings: VectorArray
    norms: FloatArray | None  # [num_texts], as in InferenceResult
    token_count: Int32Array  # [num_texts]
    truncated: BoolArray  # [num_texts]
    # By text index, the reason for a missing vector.
    errors: dict[int, FletcherError] = field(default_factory=dict)
    chunks: Chunks | None = None  # as in TokenBatch
    counts: Int32Array | None = None  # as in InferenceResult

    @classmethod
    def zeros(cls, num_texts: int, width: int) -> EmbeddingBatch:
        """A batch of float32 zero vectors, without norms and with token counts of 0."""
        vectors, truncated = np.zeros((num_texts, width), np.float32), np.zeros(num_texts, np.bool_)
        return cls(vectors, None, np.zeros(num_texts, np.int32), truncated)
