"""Texts and tokens as flat arrays, and the steps that all tokenizers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.core.batches import BoolArray, Int32Array, Int64Array, TextBatch, TokenBatch
from fletcher.errors import FletcherError, RowTooLargeError


@dataclass(frozen=True, slots=True)
class FlatTokens:
    """Tokens of texts before truncation, without special tokens.

    Attributes:
        input_ids: int32, tokens of all texts. Of a long text at least those that truncation may
            keep.
        starts: int64 [num_texts], index of each text's first token in `input_ids`.
        totals: int64 [num_texts], number of each text's tokens in `input_ids`.
        exact: bool [num_texts], whether `input_ids` has all tokens of a text.
        errors: Errors of texts that were not tokenized.
    """

    input_ids: Int32Array
    starts: Int64Array
    totals: Int64Array
    exact: BoolArray
    errors: Mapping[int, FletcherError] = field(default_factory=dict)

    def framed(
        self,
        batch: TextBatch,
        limit: int,
        prefix: list[int] | None = None,
        suffix: list[int] | None = None,
    ) -> TokenBatch:
        """Truncates texts and adds special tokens, which gives the model's input.

        Args:
            batch: The texts; only `truncate` is read.
            limit: Most tokens of a text, special tokens included.
            prefix: Special tokens before each text.
            suffix: Special tokens after each text.
        """
        prefix, suffix = prefix or [], suffix or []
        num_special = len(prefix) + len(suffix)
        room = limit - num_special
        truncated: BoolArray = self.totals > room
        kept = np.minimum(self.totals, room)
        errors: dict[int, FletcherError] = dict(self.errors)
        there = np.arange(len(kept))  # texts that have tokens
        lengths = kept + num_special
        failed = np.zeros_like(truncated)
        failed[list(errors)] = True
        if batch.truncate == "error":
            for row in np.flatnonzero(truncated & ~failed).tolist():
                total = int(self.totals[row]) + num_special
                errors[row] = _too_long(total, bool(self.exact[row]), limit)
            failed |= truncated
        if failed.any():
            kept[failed] = lengths[failed] = 0
            there, truncated = np.flatnonzero(~failed), truncated & ~failed
        starts = self.starts + (self.totals - kept if batch.truncate == "start" else 0)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        input_ids = np.empty(offsets[-1], np.int32)
        firsts, ends = offsets[:-1][there], offsets[1:][there]
        for place, token in enumerate(prefix):
            input_ids[firsts + place] = token
        for place, token in enumerate(reversed(suffix), start=1):
            input_ids[ends - place] = token
        position = np.arange(int(kept.sum()))
        before = np.cumsum(kept) - kept
        target = position + np.repeat(offsets[:-1] + len(prefix) - before, kept)
        input_ids[target] = self.input_ids[position + np.repeat(starts - before, kept)]
        return TokenBatch(input_ids, offsets, truncated, errors)


def prompted(batch: TextBatch) -> TextBatch:
    """Returns the texts with the prompt in front of each text, and offsets from 0."""
    if batch.prompt:
        buffers = pa.py_buffer(batch.offsets), pa.py_buffer(batch.data)
        texts = pa.LargeStringArray.from_buffers(batch.num_texts, *buffers)
        prompt, nothing = (pa.scalar(one, pa.large_utf8()) for one in (batch.prompt, ""))
        texts = pc.binary_join_element_wise(prompt, texts, nothing)
        _, ends, data = texts.buffers()
        offsets = np.frombuffer(ends, np.int64)[: batch.num_texts + 1]
        return replace(batch, data=memoryview(data or b""), offsets=offsets, prompt="")
    first, last = int(batch.offsets[0]), int(batch.offsets[-1])
    if first == 0 and last == len(batch.data):
        return batch
    return replace(batch, data=memoryview(batch.data)[first:last], offsets=batch.offsets - first)


def _too_long(num_tokens: int, exact: bool, limit: int) -> RowTooLargeError:
    count = str(num_tokens) if exact else f"at least {num_tokens}"
    return RowTooLargeError(
        f"`text` has {count} tokens, expected at most {limit}; shorten it, or set `truncate` to "
        "end or start",
        field="truncate",
        allowed=["end", "start"],
    )
