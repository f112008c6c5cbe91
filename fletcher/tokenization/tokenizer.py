"""Tokenizer of texts; the only module that imports the `tokenizers` library."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np
import tokenizers

from fletcher.core.batches import BoolArray, Int32Array, Int64Array, TextBatch, TokenBatch
from fletcher.errors import FletcherError, InvalidCommandError, ModelError, RowTooLargeError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tokenization.chunker import TextTokens, cut
from fletcher.tokenization.flat import FlatTokens, prompted
from fletcher.tokenization.shorten import MIN_BYTES_FOR_RUNS, Shortener
from fletcher.tokenization.words import Words

# Bytes of a long text that are tokenized at first, for each wanted token. English has about 5 bytes
# a token, so 8 nearly always suffice. Each further try takes 4 times as many.
_FIRST_BYTES_PER_TOKEN = 8
_GROWTH = 4
# Most bytes that are tokenized at once of a text that cannot be divided, and most bytes for each
# wanted token. The library takes about 200 bytes of memory for each byte of a text.
_MAX_UNDIVIDED_BYTES = 1 << 20
_MAX_BYTES_PER_TOKEN = 64
# Up to this number of bytes, the library is faster than the many steps of `Words`.
_MIN_BYTES_FOR_WORDS = 512
# Up to this number of bytes, operations on whole arrays are no faster than Python lists.
_FEW_BYTES = 512


class Tokenizer:
    """Tokenizer of a model, for whole batches. Uses one core; not thread-safe.

    Args:
        tokenizer: The model's tokenizer. Its padding and truncation are switched off. This class
            truncates on whole arrays, because the library's truncation is slow: it builds an object
            for each overflowing part.
        max_length: Most tokens of a text, special tokens included.
        pad_token_id: Token that stands for a text without tokens. A text has no tokens only if it
            is empty and the tokenizer adds no special tokens.
        limits: Most tokens of a text, by prompt, for prompts with a limit below `max_length`.
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
        """Loads the tokenizer of a model bundle.

        Switches off the library's threads for this process: parallelism comes from processes.

        Raises:
            ModelError: The bundle or its tokenizer.json is missing or damaged.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        bundle = ModelBundle.from_folder(Path(folder))
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(bundle.tokenizer))
        except Exception as error:
            raise ModelError(
                f"`model` {bundle.name}: tokenizer.json cannot be read ({error}); run "
                f"`fletcher model verify {bundle.qualified_name}` to find damaged files",
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
        """Number of special tokens that every text gets, such as [CLS] and [SEP]."""
        return len(self._prefix) + len(self._suffix)

    def encode(self, batch: TextBatch) -> TokenBatch:
        """Tokenizes all texts of a batch.

        A text with more than `max_length` tokens is treated as `truncate` says. With `"end"` it
        loses its last tokens. With `"start"` it loses its first tokens, those of the prompt
        included. With `"error"` it gets a RowTooLargeError. With `chunking` a long text becomes
        several rows instead, and loses no tokens.

        Raises:
            InvalidCommandError: `max_length` leaves no room for text beside the special tokens.
        """
        if batch.chunking is not None:
            return self._with_tokens(self._cut(batch))
        most = self._limits.get(batch.prompt, self.max_length)
        limit = min(batch.max_length or most, most)
        room = limit - self.num_special_tokens
        if room < 1:
            raise InvalidCommandError(
                f"`max_length` is {limit}, expected {self.num_special_tokens + 1} to "
                f"{self.max_length}, because {self.num_special_tokens} are special tokens",
                field="max_length",
            )
        few = self._few(batch, room)
        if few is not None:
            return few
        tokens = self._tokenize(prompted(batch), room)
        return self._with_tokens(tokens.framed(batch, limit, self._prefix, self._suffix))

    def _with_tokens(self, batch: TokenBatch) -> TokenBatch:
        """Adds a padding token to rows without tokens.

        Otherwise the vector of such a row would depend on the other rows of its batch.
        """
        empty = np.diff(batch.offsets) == 0
        empty[list(batch.errors)] = False
        if not empty.any():
            return batch
        ids = np.insert(batch.input_ids, batch.offsets[:-1][empty], self._pad_token_id)
        offsets = batch.offsets + np.append(0, np.cumsum(empty))
        spans = batch.spans
        if spans is not None:  # an empty row has one empty span
            firsts, lasts = spans.bounds.T
            bounds = np.stack((firsts, np.maximum(lasts, firsts + 1)), axis=1)
            spans = replace(spans, bounds=bounds)
        return replace(batch, input_ids=ids, offsets=offsets, spans=spans)

    def _few(self, batch: TextBatch, room: int) -> TokenBatch | None:
        """Tokenizes a batch with little text, such as a search query.

        For so little text, the usual operations on whole arrays take several times as long. Returns
        None if the batch has more text, or a text to truncate.
        """
        if len(batch.data) + len(batch.prompt) * batch.num_texts > _FEW_BYTES:
            return None
        texts = _decoded(batch.data, batch.offsets)
        found = self._library([batch.prompt + text for text in texts])
        if any(len(ids) > room for ids in found):
            return None
        rows = [[*self._prefix, *ids, *self._suffix] for ids in found]
        offsets = np.array([0, *accumulate(map(len, rows))], np.int64)
        input_ids = np.array(list(chain.from_iterable(rows)), np.int32)
        return self._with_tokens(TokenBatch(input_ids, offsets, np.zeros(len(rows), np.bool_)))

    def _cut(self, batch: TextBatch) -> TokenBatch:
        """Tokenizes all texts, and cuts them into chunks."""
        assert batch.chunking is not None
        # Only the first part of a text gets the prompt.
        begun = batch if batch.carry is None else replace(batch, prompt="")
        if batch.chunking.needs_places:
            given, before = _decoded(batch.data, batch.offsets), None
            if batch.chunking.method != "tokens":
                before = "" if batch.carry is None else batch.carry.end
            texts = self._with_places(given, begun.prompt, before)
        else:
            begun = prompted(begun)
            ids, ends = self._ids(begun.data, begun.offsets)
            texts = [TextTokens.without_positions(one) for one in np.split(ids, ends[1:-1])]
        (prompt_ids,) = self._library([batch.prompt])
        special = (self._prefix, self._suffix)
        return cut(batch, texts, np.array(prompt_ids, np.int32), special, self.max_length)

    def _with_places(self, texts: list[str], prompt: str, before: str | None) -> list[TextTokens]:
        encodings = self._tokenizer.encode_batch(
            [prompt + text for text in texts], add_special_tokens=False
        )
        return [
            TextTokens.from_encoding(one.ids, one.offsets, prompt, text, before)
            for one, text in zip(encodings, texts, strict=True)
        ]

    def _tokenize(self, batch: TextBatch, room: int) -> FlatTokens:
        """Tokenizes as much of each text as truncation to `room` tokens needs."""
        starts, totals = np.zeros((2, batch.num_texts), np.int64)
        exact = np.ones(batch.num_texts, np.bool_)
        found: list[Int32Array] = []
        errors: dict[int, FletcherError] = {}
        most = max(_MAX_UNDIVIDED_BYTES, room * _MAX_BYTES_PER_TOKEN)
        rows, data, offsets = np.arange(batch.num_texts), batch.data, batch.offsets
        size = room * _FIRST_BYTES_PER_TOKEN
        while rows.size:
            kept, bounds, is_cut = self._shortened(data, offsets, size, batch.truncate == "start")
            ids, ends = self._ids(kept, bounds)
            starts[rows] = sum(map(len, found)) + ends[:-1]
            totals[rows] = np.diff(ends)
            exact[rows] = ~is_cut
            found.append(ids)
            again = is_cut & (np.diff(ends) <= room)
            if size >= most and self._words is None and again.any():
                errors |= {row: _undivided(size) for row in rows[again].tolist()}
                break
            rows, size = rows[again], size * _GROWTH
            data, offsets = _taken(data, offsets, again)
        flat = np.concatenate([np.zeros(0, np.int32), *found])
        return FlatTokens(flat, starts, totals, exact, errors)

    def _ids(self, data: bytes | memoryview, offsets: Int64Array) -> tuple[Int32Array, Int64Array]:
        """Does what `Words.tokenize` does, for any amount of text and any tokenizer."""
        if self._words is not None and len(data) > _MIN_BYTES_FOR_WORDS:
            return self._words.tokenize(data, offsets)
        ids = self._library(_decoded(data, offsets))
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        # The library returns ids as Python lists, which costs 2 of 120 microseconds a text. One
        # fromiter over all lists is the fastest conversion to an array.
        flat: Int32Array = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
        return flat, np.append(0, np.cumsum(lengths))

    def _library(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _shortened(
        self, data: bytes | memoryview, offsets: Int64Array, size: int, from_end: bool
    ) -> tuple[bytes | memoryview, Int64Array, BoolArray]:
        """Shortens texts to at most `size` bytes.

        Returns:
            The joined texts, their offsets, and bool [num_texts], whether a text may have lost
            tokens.
        """
        is_cut = np.zeros(len(offsets) - 1, np.bool_)
        is_long = np.diff(offsets) > min(size, MIN_BYTES_FOR_RUNS)
        if not is_long.any():
            return data, offsets, is_cut
        view, parts, lengths = memoryview(data), [], np.diff(offsets)
        done = 0
        for row in np.flatnonzero(is_long).tolist():
            first, last = int(offsets[row]), int(offsets[row + 1])
            part, is_cut[row] = self._shortener.shorten(view[first:last], size, from_end)
            parts += [view[done:first], part]
            lengths[row], done = len(part), last
        return b"".join([*parts, view[done:]]), np.append(0, np.cumsum(lengths)), is_cut


def _undivided(size: int) -> RowTooLargeError:
    return RowTooLargeError(
        f"`text` has {size:,} bytes with few tokens, or few places where it can be divided, such "
        "as a space after a letter; tokenizing it would take too much memory: shorten it"
    )


def _decoded(data: bytes | memoryview, offsets: Int64Array) -> list[str]:
    view = memoryview(data)
    return [str(view[first:last], "utf-8") for first, last in pairwise(offsets.tolist())]


def _taken(
    data: bytes | memoryview, offsets: Int64Array, wanted: BoolArray
) -> tuple[bytes | memoryview, Int64Array]:
    view, lengths = memoryview(data), np.diff(offsets)[wanted]
    bounds = zip(offsets[:-1][wanted].tolist(), offsets[1:][wanted].tolist(), strict=True)
    return b"".join(view[first:last] for first, last in bounds), np.append(0, np.cumsum(lengths))


def _special_tokens(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the tokens that the tokenizer puts before and after every text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise ModelError(
        "`model`: tokenizer.json changes a text's tokens when it adds special tokens, expected one "
        "that puts them before and after; choose another model",
        field="model",
    )
