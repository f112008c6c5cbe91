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
    """State between two text parts of one text that is cut into chunks.

    Attributes:
        prompt_ids: int32 [n], prompt tokens of each chunk.
        input_ids: int32 [n], the last tokens so far, which are not in a finished chunk.
        starts: int64 [n, 2], character and byte of the text where each of these begins.
        levels: int8 [n], what begins at each of these (see `fletcher.tokenization.sentences`).
        end: The text's last characters so far.
        size: int64 [2], characters and bytes of the text so far.
        num_chunks: Chunks so far.
        num_covered: Leading tokens of the next chunk that are in the last chunk too.
        num_before: Leading tokens of `input_ids` that are context of the next chunk, not part of
            it.
    """

    prompt_ids: Int32Array
    input_ids: Int32Array
    starts: Int64Array
    levels: npt.NDArray[np.int8]
    end: str
    size: Int64Array
    num_chunks: int
    num_covered: int
    num_before: int = 0


@dataclass(frozen=True, slots=True)
class Chunks:
    """Rows of a batch that are chunks of texts.

    Attributes:
        offsets: int64 [num_texts + 1], rows of text i are offsets[i] to offsets[i + 1]; a text part
            may have none.
        index: int32 [num_rows], number of the chunk in its text, from 0.
        num_tokens: int32 [num_rows], tokens of the text itself.
        text_ranges: int64 [num_rows, 4], each chunk's range of the text: first character, end
            character, first byte, end byte; ends are exclusive. The ranges cover the whole text.
            Zeros if chunks are not rows.
        begins: bool [num_rows], whether a paragraph or the text begins here; for the method
            `tokens` only the text.
    """

    offsets: Int64Array
    index: Int32Array
    num_tokens: Int32Array
    text_ranges: Int64Array
    begins: BoolArray


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts for a tokenizer, in Arrow's layout.

    Attributes:
        data: UTF-8 bytes of all texts, joined.
        offsets: int64 [num_texts + 1], byte positions in `data`; may not start at 0.
        truncate: What to do with a text longer than `max_length` tokens.
        prompt: Inserted before every text; counts as tokens of it.
        max_length: Most tokens per text, special tokens included; None: the model's length.
        chunking: How texts are cut into chunks, each a row of the TokenBatch; None: not at all.
        continued: Whether these are parts of one text, of which more comes in the next batch.
        carry: State of the text that goes on here, from the batch before.
        layers: Exit layer of the vectors; 0: the last.
        half: Whether vectors are wanted in float16; else in the graph's type.
    """

    data: bytes | memoryview
    offsets: Int64Array
    truncate: Truncate = "end"
    prompt: str = ""
    max_length: int | None = None
    chunking: Chunking | None = None
    continued: bool = False
    carry: Carry | None = None
    layers: int = 0
    half: bool = False

    @property
    def num_texts(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, slots=True)
class Spans:
    """Token spans that get a vector each, of rows read as a whole (late chunking).

    Attributes:
        counts: int32 [num_rows], spans of each row, at least one.
        bounds: int32 [num_spans, 2], row by row: first token and end token (exclusive) of each
            span, counted in its row.
    """

    counts: Int32Array
    bounds: Int32Array


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokenized texts, flat. If texts are cut into chunks, each chunk is a text here.

    Attributes:
        input_ids: int32 [total_tokens], all texts joined, special tokens included.
        offsets: int64 [num_texts + 1] into `input_ids`, from 0.
        truncated: bool [num_texts], whether tokens were cut off.
        errors: By text index, why a text has no tokens and length 0: truncate="error".
        chunks: The texts that these chunks belong to; None: texts were not cut.
        carry: State for the text's next part.
        spans: The span of a row that each chunk is; None: each chunk is a row.
    """

    input_ids: Int32Array
    offsets: Int64Array
    truncated: BoolArray
    errors: dict[int, FletcherError] = field(default_factory=dict)
    chunks: Chunks | None = None
    carry: Carry | None = None
    spans: Spans | None = None

    @property
    def num_texts(self) -> int:
        return len(self.offsets) - 1

    @property
    def token_count(self) -> Int32Array:
        """int32 [num_texts], tokens that the model reads."""
        return np.diff(self.offsets).astype(np.int32)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One run of the model: rows of similar length, flat and unpadded.

    Attributes:
        input_ids: int32 [total_tokens].
        lengths: int32 [num_rows], each at least 1.
        layers: Exit layer of all rows; 0: the last.
        spans: Spans that get the vectors; None: each row gets one.
        half: Whether vectors come back in float16, which halves the transfer.
    """

    input_ids: Int32Array
    lengths: Int32Array
    layers: int = 0
    spans: Spans | None = None
    half: bool = False


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """A replica's answer to a MicroBatch.

    Attributes:
        embeddings: Pooled vectors, float32, or float16 if the MicroBatch asks for it. [num_rows,
            dim], L2-normalised if the bundle says so. [num_vectors, width] for models with several
            vectors per row. [num_spans, dim], not normalised, if the batch has spans.
        norms: float32 [num_rows], L2 norms before normalisation; None: not normalised.
        compute_s: Seconds that the device computed.
        budget_tokens: Padded tokens that the replica now takes in one run; 0: unknown.
        counts: int32 [num_rows], vectors of each row (`fletcher.vectors.ragged`); None: one per row
            or span.
    """

    embeddings: VectorArray
    norms: FloatArray | None
    compute_s: float
    budget_tokens: int = 0
    counts: Int32Array | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingBatch:
    """The vectors of one TextBatch, in its order.

    Attributes:
        embeddings: float32 [num_texts, dim], or float16 if the TextBatch asks for it; zeros for
            texts in `errors`. With `counts` float32 [num_vectors, width].
        norms: float32 [num_texts] or None, as in InferenceResult.
        token_count: int32 [num_texts].
        truncated: bool [num_texts].
        errors: By text index, why a text has no vector.
        counts: As in InferenceResult.
        chunks: The texts that these chunks belong to, each a text here; None: texts were not cut.
    """

    embeddings: VectorArray
    norms: FloatArray | None
    token_count: Int32Array
    truncated: BoolArray
    errors: dict[int, FletcherError] = field(default_factory=dict)
    chunks: Chunks | None = None
    counts: Int32Array | None = None
