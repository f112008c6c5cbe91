"""The payloads that stages hand to each other: frozen, whole arrays, no per-row objects."""

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
    """What is left when one part of a text has been cut into chunks, for the next part.

    Attributes:
        prompt_ids: int32 [n], tokens that go before the text of each chunk.
        input_ids: int32 [n], tokens at the end, of which a chunk is still to come.
        starts: int64 [n, 2], where in the text these begin: character and byte.
        levels: int8 [n], what begins with these, as `fletcher.tokenization.sentences` says it.
        end: The text's last characters so far.
        size: int64 [2], characters and bytes of the text so far.
        num_chunks: Chunks so far.
        num_covered: Of the tokens of the next chunk, how many at the beginning are in the last one.
        num_before: Of these tokens, how many at the beginning are only read with the next chunk.
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
    """Which rows of a batch are chunks of which text.

    Attributes:
        offsets: int64 [num_texts + 1], rows of text i are offsets[i] to offsets[i + 1]; a part of a
            text may have none.
        index: int32 [num_rows], 0 for a text's first chunk.
        num_tokens: int32 [num_rows], tokens of the text itself.
        text_ranges: int64 [num_rows, 4], where in the text a chunk begins and ends: first and last
            character (this not included), first and last byte; zeros where nobody asked for rows.
            They leave nothing of the text out.
        begins: bool [num_rows], a paragraph begins with it, or its text; of `tokens` only that.
    """

    offsets: Int64Array
    index: Int32Array
    num_tokens: Int32Array
    text_ranges: Int64Array
    begins: BoolArray


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts as they leave the front process for a tokenizer, in Arrow's own layout.

    Attributes:
        data: UTF-8 bytes of all texts, one after the other.
        offsets: int64 [num_texts + 1], byte positions in `data`; not necessarily from 0.
        truncate: What to do with a text longer than `max_length` tokens.
        prompt: Put before every text; counted in its tokens.
        max_length: Tokens per text at most, special tokens included; None: the model's own.
        chunking: How texts are cut into chunks, each a row of the TokenBatch; None: not at all.
        continued: These are parts of one text, and more of it comes in the next batch.
        carry: What the batch before left of the text that goes on here.
        layers: The exit layer that their vectors come from; 0: the last.
        half: Their vectors are wanted in float16, and otherwise as the graph gives them.
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
    """Parts of rows that get a vector each, while the model reads all of the row.

    Attributes:
        counts: int32 [num_rows], parts of each row, one at least.
        bounds: int32 [num_spans, 2], row after row: a part's first token, counted in its row,
            and the first one behind it.
    """

    counts: Int32Array
    bounds: Int32Array


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokenized texts, flat. Where texts are cut into chunks, each of these is a text here.

    Attributes:
        input_ids: int32 [total_tokens], all texts one after the other, special tokens included.
        offsets: int64 [num_texts + 1] into `input_ids`, from 0.
        truncated: bool [num_texts], True where tokens were cut off.
        errors: By text index, why a text has no tokens (it then has length 0): truncate="error".
        chunks: Whose chunks these are; None: texts were not cut.
        carry: What is left for the text's next part.
        spans: Which part of which row each chunk is; None: each chunk is a row.
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
        """int32 [num_texts], tokens that the model sees."""
        return np.diff(self.offsets).astype(np.int32)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One run of the model: rows of similar length, flat and unpadded.

    Attributes:
        input_ids: int32 [total_tokens].
        lengths: int32 [num_rows], each at least 1.
        layers: The exit layer that all of them leave after; 0: the last.
        spans: What gets a vector in place of a row; None: rows do.
        half: Their vectors are to come back in float16: half as much to send, and no more to do.
    """

    input_ids: Int32Array
    lengths: Int32Array
    layers: int = 0
    spans: Spans | None = None
    half: bool = False


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """What a replica answers to a MicroBatch.

    Attributes:
        embeddings: float32 [num_rows, dim] (float16 where the MicroBatch says so), pooled and,
            where the bundle says so, L2-normalised; of models with several vectors a row all of
            them, [num_vectors, width]; where the batch has spans theirs, as pooled,
            [num_spans, dim].
        norms: float32 [num_rows], the L2 norm before normalisation; None where not normalised.
        compute_s: Seconds the device was computing.
        budget_tokens: Padded tokens that the replica takes in one run now; 0: not said.
        counts: int32 [num_rows], vectors of each row (`fletcher.vectors.ragged`); None: one each,
            or each span's.
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
        embeddings: float32 [num_texts, dim], or float16 where the TextBatch says so; rows in
            `errors` hold zeros. With `counts` float32 [num_vectors, width].
        norms: float32 [num_texts] or None, as in InferenceResult.
        token_count: int32 [num_texts].
        truncated: bool [num_texts].
        errors: By text index, why a text has no vector.
        counts: As in InferenceResult.
        chunks: Whose chunks these are, each a text here; None: texts were not cut.
    """

    embeddings: VectorArray
    norms: FloatArray | None
    token_count: Int32Array
    truncated: BoolArray
    errors: dict[int, FletcherError] = field(default_factory=dict)
    chunks: Chunks | None = None
    counts: Int32Array | None = None
