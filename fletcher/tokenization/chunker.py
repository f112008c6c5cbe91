"""Division of tokenized texts into chunks.

A text may come in consecutive parts (`TextBatch.continued`). State is carried from each part to the
next. So a text in parts, of any length, is cut into the same chunks as if it came in one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from fletcher.core.batches import (
    BoolArray,
    Carry,
    Chunks,
    Int32Array,
    Int64Array,
    Spans,
    TextBatch,
    TokenBatch,
)
from fletcher.core.chunking import Chunking
from fletcher.tokenization.frames import context, frames
from fletcher.tokenization.sentences import CONTEXT, PARAGRAPH, SENTENCE, Levels, levels

_NO_IDS = np.zeros(0, np.int32)
_LEVELS = {
    "tokens": (),
    "sentences": (SENTENCE,),
    "paragraphs": (PARAGRAPH, SENTENCE),
    "each-sentence": (SENTENCE,),
    "each-paragraph": (PARAGRAPH, SENTENCE),
}


@dataclass(frozen=True, slots=True)
class TextTokens:
    """Tokens of one text, or of one part of it.

    Attributes:
        ids: int32 [n], tokens without special tokens. The first part begins with the prompt.
        starts: int64 [n, 2], character and byte of the part at which each token starts; 0 for
            tokens of the prompt.
        levels: int8 [n], whether a sentence or a paragraph starts with a token.
        end: Last characters of the text so far.
        size: int64 [2], number of characters and of bytes in the part.
    """

    ids: Int32Array
    starts: Int64Array
    levels: Levels
    end: str
    size: Int64Array

    @classmethod
    def without_positions(cls, ids: Int32Array) -> TextTokens:
        """Tokens without positions, for chunkings that need no positions."""
        nothing = np.zeros(len(ids), np.int8)
        starts = np.broadcast_to(np.int64(0), (len(ids), 2))
        return cls(ids, starts, nothing, "", np.zeros(2, np.int64))

    @classmethod
    def from_encoding(
        cls,
        ids: Sequence[int],
        places: Sequence[tuple[int, int]],
        prompt: str,
        text: str,
        before: str | None,
    ) -> TextTokens:
        """Tokens of a prompt and a text, from the library's encoding.

        Args:
            places: First and end character of each token, counted in the prompt and text together.
            prompt: The prompt; empty if this is not the first part of a text.
            text: The text after the prompt.
            before: End of the text before this part. None: levels are not needed.
        """
        flat = np.fromiter(chain.from_iterable(places), np.int64, 2 * len(places))
        # Several tokens of one character may be in any order, so positions are made ascending.
        bounds = np.maximum(flat.reshape(-1, 2) - len(prompt), 0)
        characters, ends = np.maximum.accumulate(bounds, axis=0).T
        begun = levels(before, text, ends) if before is not None else np.zeros(len(ids), np.int8)
        data = np.frombuffer(text.encode(), np.uint8)
        begins = np.append(np.flatnonzero((data & 0xC0) != 0x80), len(data))
        starts = np.stack((characters, begins[characters]), axis=1)
        return cls(
            np.array(ids, np.int32),
            starts,
            begun,
            ((before or "") + text)[-CONTEXT:],
            np.array([len(text), len(data)], np.int64),
        )


def cut(
    batch: TextBatch,
    texts: Sequence[TextTokens],
    prompt_ids: Int32Array,
    special: tuple[Sequence[int], Sequence[int]],
    max_length: int,
) -> TokenBatch:
    """Cuts a batch of texts into chunks.

    Args:
        batch: The texts; `chunking` and its size are set.
        texts: Tokens of each text of the batch.
        prompt_ids: Tokens of the prompt.
        special: Special tokens before every row, and those after every row.
        max_length: Most tokens that the model reads.

    Raises:
        InvalidCommandError: A chunk has no room for text beside the overlap.
    """
    assert batch.chunking is not None
    before, after = np.array(special[0], np.int32), np.array(special[1], np.int32)
    room = batch.chunking.size - len(prompt_ids) - len(before) - len(after)
    batch.chunking.fitted(batch.chunking.size, batch.chunking.size - room)  # checks that it ends
    rows: list[Int32Array] = []
    index: list[int] = []
    num_tokens: list[int] = []
    ends = [0]
    counts: list[int] = []
    places: list[Int64Array] = []
    text_ranges: list[Int64Array] = []
    begins_there: list[BoolArray] = []
    carry: Carry | None = None
    for number, text in enumerate(texts):
        carry = (batch.carry if number == 0 else None) or _begun(text.ids, prompt_ids)
        skipped = 0 if carry is batch.carry else len(carry.prompt_ids)
        tokens = np.concatenate((carry.input_ids, text.ids[skipped:]))
        size = carry.size + text.size
        starts = np.concatenate((carry.starts, text.starts[skipped:] + carry.size, [size]))
        begins = starts.copy()
        if carry.num_chunks == 0:  # the first chunk includes text before its first token
            begins[0] = 0
        continued = batch.continued and number == len(texts) - 1
        begun = np.concatenate((carry.levels, text.levels[skipped:]))
        cuts = _cuts(batch.chunking, carry, begun, room, max_length, continued=continued)
        bounds = np.array(cuts.chunks, np.int64).reshape(-1, 2)
        head = np.concatenate((before, carry.prompt_ids))
        places.append(cuts.places(len(head), 0 if continued else len(after)))
        begins_there.append(np.append(begun, 0)[bounds[:, 0]] >= PARAGRAPH)
        if carry.num_chunks == 0:
            begins_there[-1][:1] = True
            places[-1][:1, 0] = 0
        text_ranges.append(
            np.stack((begins[bounds[:, 0]], starts[bounds[:, 1]]), axis=2).reshape(-1, 4)
        )
        for first, last in cuts.rows:
            rows += (head, tokens[first:last], after)
        counts += cuts.counts
        num_tokens += (last - first for first, last in cuts.chunks)
        index += range(carry.num_chunks, carry.num_chunks + len(bounds))
        ends.append(len(index))
        carry = Carry(
            carry.prompt_ids,
            tokens[cuts.kept :],
            starts[cuts.kept : -1],
            begun[cuts.kept :],
            text.end,
            size,
            carry.num_chunks + len(bounds),
            cuts.covered,
            cuts.first - cuts.kept,
        )
    input_ids = np.concatenate(rows) if rows else _NO_IDS
    lengths = np.fromiter(map(len, rows), np.int64, len(rows)).reshape(-1, 3).sum(axis=1)
    offsets = np.append(0, np.cumsum(lengths))
    spans = None
    if batch.chunking.late:
        bounds = np.concatenate([np.zeros((0, 2), np.int64), *places])
        spans = Spans(np.array(counts, np.int32), bounds.astype(np.int32))
    return TokenBatch(
        input_ids,
        offsets,
        np.zeros(len(lengths), np.bool_),
        chunks=Chunks(
            np.array(ends, np.int64),
            np.array(index, np.int32),
            np.array(num_tokens, np.int32),
            np.concatenate([np.zeros((0, 4), np.int64), *text_ranges]),
            np.concatenate([np.zeros(0, np.bool_), *begins_there]),
        ),
        carry=carry if batch.continued else None,
        spans=spans,
    )


@dataclass(frozen=True, slots=True)
class _Cuts:
    """Division of tokens into chunks and rows. Ranges are a first and an end token.

    End tokens are exclusive.

    Attributes:
        chunks: Range of each chunk.
        rows: Range of each row that the model reads. That is a chunk, or for late chunking a frame.
        counts: Number of chunks in each row.
        kept: First token that is kept for the text's next part.
        first: First token of the next chunk.
        covered: Number of the next chunk's tokens that are also in the chunk before it.
    """

    chunks: list[tuple[int, int]]
    rows: list[tuple[int, int]]
    counts: list[int]
    kept: int
    first: int
    covered: int

    def places(self, before: int, after: int) -> Int64Array:
        """Returns int64 [num_chunks, 2], the range of each chunk within its row.

        Args:
            before: Number of tokens before the text in each row.
            after: Number of tokens after the text's end, which belong to its last chunk.
        """
        firsts = np.array([first for first, _ in self.rows], np.int64) - before
        bounds = np.array(self.chunks, np.int64).reshape(-1, 2)
        places: Int64Array = bounds - np.repeat(firsts, self.counts)[:, None]
        places[-1:, 1] += after
        return places


def _cuts(
    chunking: Chunking, carry: Carry, begun: Levels, room: int, max_length: int, *, continued: bool
) -> _Cuts:
    """Cuts tokens into chunks and rows; `begun` has the level of each token."""
    done = carry.num_before + carry.num_covered
    found, first, covered = chunk_bounds(
        len(begun),
        room,
        chunking.overlap,
        [np.flatnonzero(begun >= level) for level in _LEVELS[chunking.method]],
        alone=chunking.alone,
        first=carry.num_before,
        covered=done,
        continued=continued,
    )
    if not chunking.late:
        return _Cuts(found, found, [1] * len(found), first, first, covered)
    most = max_length - chunking.size + room
    framed = frames(found, len(begun), most, room, continued=continued)
    counts = [count for *_, count in framed]
    num_done = sum(counts)
    if num_done < len(found):
        done = found[num_done - 1][1] if num_done else done
        first = found[num_done][0]
        covered = done - first
    rows = [(begin, end) for begin, end, _ in framed]
    return _Cuts(found[:num_done], rows, counts, max(0, first - context(most)), first, covered)


def chunk_bounds(
    num_tokens: int,
    room: int,
    overlap: int,
    breaks: Sequence[Int64Array] = (),
    *,
    alone: bool = False,
    first: int = 0,
    covered: int = 0,
    continued: bool,
) -> tuple[list[tuple[int, int]], int, int]:
    """Returns the ranges of chunks.

    Args:
        num_tokens: Number of tokens to cut.
        room: Most tokens of a chunk.
        overlap: Number of tokens that a chunk shares with the chunk before, less than `room`. With
            breaks it may be smaller, so that a chunk starts at a break.
        breaks: For each kind of break, the best kind first: ascending tokens before which a cut is
            preferred. Each kind contains the kind before it.
        alone: Whether a chunk ends at the first break of the best kind. If False, it ends at the
            last break that fits.
        first: First token of the next chunk.
        covered: Number of leading tokens that are in the chunk before the next one.
        continued: Whether more tokens follow. If so, only chunks that a token follows are returned.

    Returns:
        Three values: the first and end token (exclusive) of each chunk; the first token that is
        left over; and the number of left-over tokens that are also in the last chunk, the overlap.
    """
    found = []
    while True:
        last = _first_break(breaks[:1], first + 1, first + room) if alone else None
        if last is None:
            if first + room >= num_tokens:
                break
            last = _last_break(breaks, first, first + room) or first + room
        if last <= covered:  # the overlap is dropped: no further tokens fit after it
            first = covered
            continue
        found.append((first, last))
        covered = last
        first = _first_break(breaks, max(last - overlap, first + 1), last) or last - overlap
    if not continued:
        found.append((first, num_tokens))
    return found, first, covered - first


def _last_break(breaks: Sequence[Int64Array], first: int, limit: int) -> int | None:
    """Returns the last break after `first` and up to `limit`, of the best kind found."""
    for one in breaks:
        place = int(np.searchsorted(one, limit, side="right")) - 1
        if place >= 0 and one[place] > first:
            return int(one[place])
    return None


def _first_break(breaks: Sequence[Int64Array], first: int, limit: int) -> int | None:
    """Returns the first break of any kind from `first` to `limit`."""
    if not breaks:
        return None
    place = int(np.searchsorted(breaks[-1], first))
    found = place < len(breaks[-1]) and breaks[-1][place] <= limit
    return int(breaks[-1][place]) if found else None


def _begun(ids: Int32Array, prompt_ids: Int32Array) -> Carry:
    """Returns the state at the start of a text, with the prompt's tokens.

    The state has only the leading prompt tokens that are also the first of `ids`. The last ones may
    differ, because SentencePiece attaches the space at the end of a prompt to the next word.
    """
    length = min(len(ids), len(prompt_ids))
    same = ids[:length] == prompt_ids[:length]
    length = length if same.all() else int(np.argmin(same))
    nothing = np.zeros((0, 2), np.int64)
    return Carry(
        prompt_ids[:length], _NO_IDS, nothing, np.zeros(0, np.int8), "", np.zeros(2, np.int64), 0, 0
    )
