"""Text to token ids: the one module that speaks to the `tokenizers` library."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np
import tokenizers

from fletcher.core.batches import BoolArray, Int32Array, Int64Array, TextBatch, TokenBatch
from fletcher.errors import InvalidCommandError, ModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tokenization.chunker import TextTokens, cut
from fletcher.tokenization.flat import FlatTokens, prompted
from fletcher.tokenization.shorten import MIN_BYTES_FOR_RUNS, Shortener
from fletcher.tokenization.words import Words

# Bytes of a long text that are tokenized first, per token wanted. English takes about 5 bytes a
# token, so a first try of 8 nearly always suffices; each further try takes 4 times as many.
_FIRST_BYTES_PER_TOKEN = 8
_GROWTH = 4
# Below this the library is quicker than the many steps of `Words`.
_MIN_BYTES_FOR_WORDS = 512
# Below this nothing is gained by steps over whole arrays.
_FEW_BYTES = 512


class Tokenizer:
    """A model's tokenizer for whole batches; one core, not for several threads at once.

    Args:
        tokenizer: The model's own. Its padding and truncation are switched off: both are done here
            on whole arrays, and truncation there builds an object for every overflowing piece.
        max_length: Tokens per text at most, special tokens included.
        pad_token_id: What stands for a text without any token; only tokenizers that add no special
            tokens know such texts.
        limits: By prompt, tokens per text at most where that is less.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        max_length: int,
        pad_token_id: int = 0,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.max_length = max_length
        self._limits = limits or {}
        self._pad_token_id = pad_token_id
        self._tokenizer = tokenizer
        self._prefix, self._suffix = _special_tokens(tokenizer)
        self._shortener = Shortener.from_json(tokenizer.to_str())
        boundaries = self._shortener.boundaries
        self._words = Words(self._library, boundaries) if boundaries.any() else None

    @classmethod
    def from_bundle(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model bundle.

        Switches the library's own threads off for this process: parallelism here is processes.

        Raises:
            ModelError: The bundle or its tokenizer.json is missing or damaged.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        bundle = ModelBundle.from_folder(Path(folder))
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(bundle.tokenizer))
        except Exception as error:
            raise ModelError(
                f"`model` {bundle.name}: tokenizer.json cannot be read ({error}); "
                f"`fletcher model verify {bundle.qualified_name}` tells what is damaged",
                field="model",
            ) from error
        queries = bundle.queries
        return cls(
            tokenizer,
            max_length=bundle.max_length,
            pad_token_id=bundle.pad_token_id,
            limits=None if queries is None else {bundle.prompts["query"]: queries.length},
        )

    @property
    def num_special_tokens(self) -> int:
        """Tokens that every text gets beside its own, such as [CLS] and [SEP]."""
        return len(self._prefix) + len(self._suffix)

    def encode(self, batch: TextBatch) -> TokenBatch:
        """Tokenizes all texts of a batch.

        A text of more than `max_length` tokens loses its last (`truncate="end"`) or first
        (`"start"`, the prompt among them) tokens, or gets a RowTooLargeError (`"error"`). With
        `chunking` it becomes several rows, and loses nothing.

        Raises:
            InvalidCommandError: `max_length` leaves no room beside the special tokens.
        """
        if batch.chunking is not None:
            return self._with_tokens(self._cut(batch))
        most = self._limits.get(batch.prompt, self.max_length)
        limit = min(batch.max_length or most, most)
        room = limit - self.num_special_tokens
        if room < 1:
            raise InvalidCommandError(
                f"`max_length` is {limit}, expected {self.num_special_tokens + 1} to "
                f"{self.max_length}: {self.num_special_tokens} are special tokens",
                field="max_length",
            )
        few = self._few(batch, room)
        if few is not None:
            return few
        tokens = self._tokenize(prompted(batch), room)
        return self._with_tokens(tokens.framed(batch, limit, self._prefix, self._suffix))

    def _with_tokens(self, batch: TokenBatch) -> TokenBatch:
        """The same, with a token in every row: a vector of none would depend on its company."""
        empty = np.diff(batch.offsets) == 0
        empty[list(batch.errors)] = False
        if not empty.any():
            return batch
        ids = np.insert(batch.input_ids, batch.offsets[:-1][empty], self._pad_token_id)
        offsets = batch.offsets + np.append(0, np.cumsum(empty))
        spans = batch.spans
        if spans is not None:  # of a row without tokens there is one, without tokens
            firsts, lasts = spans.bounds.T
            bounds = np.stack((firsts, np.maximum(lasts, firsts + 1)), axis=1)
            spans = replace(spans, bounds=bounds)
        return replace(batch, input_ids=ids, offsets=offsets, spans=spans)

    def _few(self, batch: TextBatch, room: int) -> TokenBatch | None:
        """A little text, as a search sends it, by the shortest way; None: it is not that little.

        The same steps for many texts take a multiple of the time, most of it to begin.
        """
        if len(batch.data) + len(batch.prompt) * batch.num_texts > _FEW_BYTES:
            return None
        view, bounds = memoryview(batch.data), pairwise(batch.offsets.tolist())
        texts = [batch.prompt + str(view[first:last], "utf-8") for first, last in bounds]
        found = self._library(texts)
        if any(len(ids) > room for ids in found):
            return None
        rows = [[*self._prefix, *ids, *self._suffix] for ids in found]
        offsets = np.array([0, *accumulate(map(len, rows))], np.int64)
        input_ids = np.array(list(chain.from_iterable(rows)), np.int32)
        return self._with_tokens(TokenBatch(input_ids, offsets, np.zeros(len(rows), np.bool_)))

    def _cut(self, batch: TextBatch) -> TokenBatch:
        """Tokenizes all texts, and cuts them into chunks."""
        assert batch.chunking is not None
        # Of a text that goes on, the prompt was before its first part.
        begun = batch if batch.carry is None else replace(batch, prompt="")
        if batch.chunking.needs_places:
            view, bounds = memoryview(batch.data), pairwise(batch.offsets.tolist())
            given = [str(view[first:last], "utf-8") for first, last in bounds]
            before = None
            if batch.chunking.method != "tokens":
                before = "" if batch.carry is None else batch.carry.end
            texts = self._with_places(given, begun.prompt, before)
        else:
            begun = prompted(begun)
            ids, ends = self._ids(begun.data, begun.offsets)
            texts = [TextTokens.without_places(one) for one in np.split(ids, ends[1:-1])]
        (prompt_ids,) = self._library([batch.prompt])
        special = (self._prefix, self._suffix)
        return cut(batch, texts, np.array(prompt_ids, np.int32), special, self.max_length)

    def _with_places(self, texts: list[str], prompt: str, before: str | None) -> list[TextTokens]:
        encodings = self._tokenizer.encode_batch(
            [prompt + text for text in texts], add_special_tokens=False
        )
        return [
            TextTokens.at(one.ids, one.offsets, prompt, text, before)
            for one, text in zip(encodings, texts, strict=True)
        ]

    def _tokenize(self, batch: TextBatch, room: int) -> FlatTokens:
        """The tokens of every text, more than `room` of them where it has so many."""
        starts, totals = np.zeros((2, batch.num_texts), np.int64)
        exact = np.ones(batch.num_texts, np.bool_)
        found: list[Int32Array] = []
        rows, data, offsets = np.arange(batch.num_texts), batch.data, batch.offsets
        size = room * _FIRST_BYTES_PER_TOKEN
        while rows.size:
            pieces, bounds, is_cut = self._shortened(data, offsets, size, batch.truncate == "start")
            ids, ends = self._ids(pieces, bounds)
            starts[rows] = sum(map(len, found)) + ends[:-1]
            totals[rows] = np.diff(ends)
            exact[rows] = ~is_cut
            found.append(ids)
            again = is_cut & (np.diff(ends) <= room)
            rows, size = rows[again], size * _GROWTH
            data, offsets = _taken(data, offsets, again)
        return FlatTokens(np.concatenate([np.zeros(0, np.int32), *found]), starts, totals, exact)

    def _ids(self, data: bytes | memoryview, offsets: Int64Array) -> tuple[Int32Array, Int64Array]:
        """As `Words.tokens`, also for a little text and for tokenizers that look beyond words."""
        if self._words is not None and len(data) > _MIN_BYTES_FOR_WORDS:
            return self._words.tokens(data, offsets)
        view, bounds = memoryview(data), pairwise(offsets.tolist())
        ids = self._library([str(view[first:last], "utf-8") for first, last in bounds])
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        # The library hands ids over as Python lists, 2 of 120 microseconds a text; one fromiter
        # over all of them is the cheapest way from there into an array.
        flat: Int32Array = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
        return flat, np.append(0, np.cumsum(lengths))

    def _library(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _shortened(
        self, data: bytes | memoryview, offsets: Int64Array, size: int, from_end: bool
    ) -> tuple[bytes | memoryview, Int64Array, BoolArray]:
        """Texts of `size` bytes at most, and which may have fewer tokens than they had."""
        is_cut = np.zeros(len(offsets) - 1, np.bool_)
        is_long = np.diff(offsets) > min(size, MIN_BYTES_FOR_RUNS)
        if not is_long.any():
            return data, offsets, is_cut
        view, parts, lengths = memoryview(data), [], np.diff(offsets)
        done = 0
        for row in np.flatnonzero(is_long).tolist():
            first, last = int(offsets[row]), int(offsets[row + 1])
            piece, is_cut[row] = self._shortener.shorten(view[first:last], size, from_end)
            parts += [view[done:first], piece]
            lengths[row], done = len(piece), last
        return b"".join([*parts, view[done:]]), np.append(0, np.cumsum(lengths)), is_cut


def _taken(
    data: bytes | memoryview, offsets: Int64Array, wanted: BoolArray
) -> tuple[bytes | memoryview, Int64Array]:
    """Some of the texts."""
    view, lengths = memoryview(data), np.diff(offsets)[wanted]
    bounds = zip(offsets[:-1][wanted].tolist(), offsets[1:][wanted].tolist(), strict=True)
    return b"".join(view[first:last] for first, last in bounds), np.append(0, np.cumsum(lengths))


def _special_tokens(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after every text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise ModelError(
        "`model`: tokenizer.json changes a text's tokens when it adds special tokens, "
        "which is not supported",
        field="model",
    )
