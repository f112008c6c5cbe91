"""Payloads between pipeline stages: whole arrays, no per-row objects."""

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
    """State between two text parts of one text that is cut into chunks."""

    prompt_ids: Int32Array  # [n], prompt tokens of each chunk
    input_ids: Int32Array  # [n], the last tokens so far, which are not in a finished chunk
    starts: Int64Array  # [n, 2], character and byte of the text where each of these begins
    levels: npt.NDArray[np.int8]  # [n], what begins there, see `fletcher.tokenization.sentences`
    end: str  # the text's last characters so far
    size: Int64Array  # [2], characters and bytes of the text so far
    num_chunks: int  # so far
    num_covered: int  # leading tokens of the next chunk that are in the last chunk too
    num_before: int = 0  # leading tokens of `input_ids` that are context of the next chunk only


@dataclass(frozen=True, slots=True)
class Chunks:
    """Rows of a batch that are chunks of texts."""

    # [num_texts + 1], rows of text i are offsets[i] to offsets[i + 1]; a text part may have none.
    offsets: Int64Array
    index: Int32Array  # [num_rows], number of the chunk in its text, from 0
    num_tokens: Int32Array  # [num_rows], tokens of the text itself
    # [num_rows, 4], each chunk's range of the text: first character, end character, first byte, end
    # byte; ends are exclusive. The ranges cover the whole text. Zeros if chunks are not rows.
    text_ranges: Int64Array
    # [num_rows], whether a paragraph or the text begins here; for `tokens` only the text.
    begins: BoolArray


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts for a tokenizer, in Arrow's layout."""

    data: bytes | memoryview  # UTF-8 bytes of all texts, joined
    offsets: Int64Array  # [num_texts + 1], byte positions in `data`; may not start at 0
    truncate: Truncate = "end"  # what to do with a text longer than `max_length` tokens
    prompt: str = ""  # inserted before every text; counts as tokens of it
    max_length: int | None = None  # in tokens, special ones included; None: the model's length
    chunking: Chunking | None = None  # each chunk is a row of the TokenBatch; None: no cuts
    continued: bool = False  # parts of one text, of which more comes in the next batch
    carry: Carry | None = None  # of the text that goes on here, from the batch before
    layers: int = 0  # exit layer of the vectors; 0: the last
    half: bool = False  # vectors are wanted in float16; else in the graph's type

    @property
    def num_texts(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, slots=True)
class Spans:
    """Token spans that get a vector each, of rows read as a whole (late chunking)."""

    counts: Int32Array  # [num_rows], spans of each row, at least one
    bounds: Int32Array  # [num_spans, 2], first and end token (exclusive) of each, within its row


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokenized texts, flat. If texts are cut into chunks, each chunk is a text here."""

    input_ids: Int32Array  # [total_tokens], all texts joined, special tokens included
    offsets: Int64Array  # [num_texts + 1] into `input_ids`, from 0
    truncated: BoolArray  # [num_texts], whether tokens were cut off
    # By text index, why a text has no tokens and length 0: truncate="error".
    errors: dict[int, FletcherError] = field(default_factory=dict)
    chunks: Chunks | None = None  # the texts of these chunks; None: texts were not cut
    carry: Carry | None = None  # for the text's next part
    spans: Spans | None = None  # the span of a row that each chunk is; None: each chunk is a row

    @property
    def num_texts(self) -> int:
        return len(self.offsets) - 1

    @property
    def token_count(self) -> Int32Array:
        """int32 [num_texts], tokens that the model reads."""
        return np.diff(self.offsets).astype(np.int32)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One run of the model: rows of similar length, flat and unpadded."""

    input_ids: Int32Array  # [total_tokens]
    lengths: Int32Array  # [num_rows], each at least 1
    layers: int = 0  # exit layer of all rows; 0: the last
    spans: Spans | None = None  # these get the vectors; None: each row gets one
    half: bool = False  # vectors come back in float16, which halves the transfer


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """A replica's answer to a MicroBatch."""

    # Pooled vectors, float32, or float16 if the MicroBatch asks for it. [num_rows, dim],
    # L2-normalised if the bundle says so. [num_vectors, width] for models with several vectors per
    # row. [num_spans, dim], not normalised, if the batch has spans.
    embeddings: VectorArray
    norms: FloatArray | None  # [num_rows], L2 norms before normalisation; None: not normalised
    compute_s: float  # seconds that the device computed
    budget_tokens: int = 0  # padded tokens that the replica now takes in one run; 0: unknown
    # [num_rows], vectors of each row (`fletcher.vectors.ragged`); None: one per row or span.
    counts: Int32Array | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingBatch:
    """The vectors of one TextBatch, in its order."""

    # [num_texts, dim], float32, or float16 if the TextBatch asks for it; zeros for texts in
    # `errors`. With `counts` float32 [num_vectors, width].
    embeddings: VectorArray
    norms: FloatArray | None  # [num_texts], as in InferenceResult
    token_count: Int32Array  # [num_texts]
    truncated: BoolArray  # [num_texts]
    errors: dict[int, FletcherError] = field(default_factory=dict)  # by text, why it has no vector
    chunks: Chunks | None = None  # as in TokenBatch
    counts: Int32Array | None = None  # as in InferenceResult

    @classmethod
    def zeros(cls, num_texts: int, width: int) -> EmbeddingBatch:
        """Returns float32 vectors of zeros, without norms."""
        vectors, truncated = np.zeros((num_texts, width), np.float32), np.zeros(num_texts, np.bool_)
        return cls(vectors, None, np.zeros(num_texts, np.int32), truncated)
