"""Text to token ids: the one module that speaks to the `tokenizers` library."""

from __future__ import annotations

import os
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from fletcher.batches import BoolArray, Int32Array, TextBatch, TokenBatch, Truncate
from fletcher.errors import FletcherError, InvalidCommandError, ModelError, RowTooLargeError
from fletcher.models.bundle import ModelBundle
from fletcher.tokenization.chunker import cut
from fletcher.tokenization.shorten import Shortener

# Bytes of a long text that are tokenized first, per token wanted. English takes about 5 bytes a
# token, so a first try of 8 nearly always suffices; each further try takes 4 times as many.
_FIRST_BYTES_PER_TOKEN = 8
_GROWTH = 4


class Tokenizer:
    """A model's tokenizer for whole batches; one core, not for several threads at once.

    Args:
        tokenizer: The model's own. Its padding and truncation are switched off: both are done here
            on whole arrays, and truncation there builds an object for every overflowing piece.
        max_length: Tokens per text at most, special tokens included.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, max_length: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._prefix, self._suffix = _special_tokens(tokenizer)
        self._shortener = Shortener.of(tokenizer.to_str())

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model bundle.

        Switches the library's own threads off for this process: parallelism here is processes.

        Raises:
            ModelError: The bundle or its tokenizer.json is missing or damaged.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        bundle = ModelBundle.load(Path(folder))
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(bundle.tokenizer))
        except Exception as error:
            raise ModelError(
                f"`model` {bundle.name}: tokenizer.json cannot be read ({error}); "
                f"`fletcher model verify {bundle.name}` tells what is damaged",
                field="model",
            ) from error
        return cls(tokenizer, max_length=bundle.max_length)

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
            return self._cut(batch)
        limit = min(batch.max_length or self.max_length, self.max_length)
        room = limit - self.num_special_tokens
        if room < 1:
            raise InvalidCommandError(
                f"`max_length` is {limit}, expected {self.num_special_tokens + 1} to "
                f"{self.max_length}: {self.num_special_tokens} are special tokens",
                field="max_length",
            )
        rows, total, exact = self._tokenize(_texts(batch), room, batch.truncate)
        truncated = total > room
        errors: dict[int, FletcherError] = {}
        if batch.truncate == "error":
            for row in np.flatnonzero(truncated).tolist():
                rows[row] = []
                errors[row] = _too_long(
                    int(total[row]) + self.num_special_tokens, bool(exact[row]), limit
                )
            truncated = np.zeros(len(rows), dtype=np.bool_)
        return self._assemble(rows, room, batch.truncate, truncated, errors)

    def _cut(self, batch: TextBatch) -> TokenBatch:
        """Tokenizes all texts, and cuts them into chunks."""
        texts = [str(text, "utf-8") for text in _texts(batch)]
        encodings = self._tokenizer.encode_batch_fast(
            [*texts, batch.prompt], add_special_tokens=False
        )
        *ids, prompt_ids = (np.array(encoding.ids, np.int32) for encoding in encodings)
        return cut(batch, ids, prompt_ids, (self._prefix, self._suffix))

    def _tokenize(
        self, texts: list[memoryview], room: int, truncate: Truncate
    ) -> tuple[list[list[int]], npt.NDArray[np.int64], BoolArray]:
        """Ids without special tokens of every text, at least `room` of them where it has so many.

        Returns:
            The ids by row; int64 [num_texts] their number; bool [num_texts], True where that is
            the number of the whole text and not just of the part that was enough.
        """
        rows: list[list[int]] = [[] for _ in texts]
        exact = np.ones(len(texts), dtype=np.bool_)
        pending = list(range(len(texts)))
        size: int = room * _FIRST_BYTES_PER_TOKEN
        while pending:
            pieces, cut = [], []
            for row in pending:
                piece, is_cut = self._shortener.shorten(texts[row], size, truncate == "start")
                pieces.append(str(piece, "utf-8"))
                cut.append(is_cut)
            encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            again = []
            for row, encoding, is_cut in zip(pending, encodings, cut, strict=True):
                ids = encoding.ids
                if is_cut and len(ids) <= room:
                    again.append(row)
                else:
                    rows[row] = ids
                    exact[row] = not is_cut
            pending, size = again, size * _GROWTH
        total = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return rows, total, exact

    def _assemble(
        self,
        rows: list[list[int]],
        room: int,
        truncate: Truncate,
        truncated: BoolArray,
        errors: dict[int, FletcherError],
    ) -> TokenBatch:
        for row in np.flatnonzero(truncated).tolist():
            rows[row] = rows[row][-room:] if truncate == "start" else rows[row][:room]
        prefix, suffix = self._prefix, self._suffix
        parts = (
            part
            for row, ids in enumerate(rows)
            if row not in errors
            for part in (prefix, ids, suffix)
        )
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        lengths += self.num_special_tokens
        lengths[list(errors)] = 0
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        # The library hands ids over as Python lists, 2 of 120 microseconds a text; one fromiter
        # over all of them is the cheapest way from there into an array.
        input_ids: Int32Array = np.fromiter(
            chain.from_iterable(parts), dtype=np.int32, count=int(offsets[-1])
        )
        return TokenBatch(input_ids, offsets, truncated, errors)


def _texts(batch: TextBatch) -> list[memoryview]:
    """The UTF-8 bytes of each text, prompt included; views where there is no prompt."""
    data = memoryview(batch.data)
    bounds = batch.offsets.tolist()
    views = [data[first:last] for first, last in pairwise(bounds)]
    if not batch.prompt:
        return views
    prompt = batch.prompt.encode()
    # Where a text goes on, its prompt was in the part before.
    begin = 0 if batch.carry is None else 1
    return views[:begin] + [memoryview(prompt + bytes(view)) for view in views[begin:]]


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


def _too_long(num_tokens: int, exact: bool, limit: int) -> RowTooLargeError:
    count = str(num_tokens) if exact else f"at least {num_tokens}"
    return RowTooLargeError(
        f"the text has {count} tokens, at most {limit} are allowed; shorten it or ask for "
        "`truncate` end or start",
        field="truncate",
        allowed=["end", "start"],
    )
