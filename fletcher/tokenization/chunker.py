"""From the tokens of texts to rows of tokens, one a chunk.

A text may come in parts, one after the other (`TextBatch.continued`): what a part leaves is carried
to the next, so that a document of any length is cut as if it had come whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fletcher.batches import Carry, Chunks, Int32Array, TextBatch, TokenBatch

_NO_IDS = np.zeros(0, np.int32)


def cut(
    batch: TextBatch,
    ids: Sequence[Int32Array],
    prompt_ids: Int32Array,
    special: tuple[Sequence[int], Sequence[int]],
) -> TokenBatch:
    """The chunks of a batch of texts.

    Args:
        batch: The texts; `chunking` is set, and its size.
        ids: The tokens of each, without special ones, with the prompt's where it does not go on.
        prompt_ids: The prompt's own tokens.
        special: Tokens that go before and after every chunk.

    Raises:
        InvalidCommandError: A chunk has no room for text beside the overlap.
    """
    assert batch.chunking is not None
    before, after = np.array(special[0], np.int32), np.array(special[1], np.int32)
    room = batch.chunking.size - len(prompt_ids) - len(before) - len(after)
    batch.chunking.fitted(batch.chunking.size, batch.chunking.size - room)  # else it never ends
    rows: list[Int32Array] = []
    index: list[int] = []
    num_tokens: list[int] = []
    ends = [0]
    carry: Carry | None = None
    for text, own in enumerate(ids):
        if text == 0 and batch.carry is not None:
            carry, tokens = batch.carry, np.concatenate((batch.carry.input_ids, own))
        else:
            carry = _begun(own, prompt_ids)
            tokens = own[len(carry.prompt_ids) :]
        continued = batch.continued and text == len(ids) - 1
        found, rest = windows(len(tokens), room, batch.chunking.overlap, continued=continued)
        head = np.concatenate((before, carry.prompt_ids))
        for first, last in found:
            rows += (head, tokens[first:last], after)
            num_tokens.append(last - first)
        index += range(carry.num_chunks, carry.num_chunks + len(found))
        ends.append(len(index))
        carry = Carry(carry.prompt_ids, tokens[rest:], carry.num_chunks + len(found))
    input_ids = np.concatenate(rows) if rows else _NO_IDS
    lengths = np.fromiter(map(len, rows), np.int64, len(rows)).reshape(-1, 3).sum(axis=1)
    offsets = np.zeros(len(index) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return TokenBatch(
        input_ids,
        offsets,
        np.zeros(len(index), np.bool_),
        chunks=Chunks(
            np.array(ends, np.int64), np.array(index, np.int32), np.array(num_tokens, np.int32)
        ),
        carry=carry if batch.continued else None,
    )


def windows(
    num_tokens: int, room: int, overlap: int, *, continued: bool
) -> tuple[list[tuple[int, int]], int]:
    """Where chunks begin and end.

    Args:
        num_tokens: How many there are to be cut.
        room: Tokens that a chunk takes.
        overlap: Tokens that it has in common with the one before, fewer than `room`.
        continued: More come. A chunk is complete when there is a token behind it.

    Returns:
        First token of each chunk and the first behind it; the first token of what is left, which is
        all behind the last chunk and its overlap.
    """
    found = []
    first = 0
    while first + room < num_tokens:
        found.append((first, first + room))
        first += room - overlap
    if not continued:
        found.append((first, num_tokens))
    return found, first


def _begun(ids: Int32Array, prompt_ids: Int32Array) -> Carry:
    """Where a text begins: the prompt's tokens, as far as they are those of the text with it.

    SentencePiece joins the space that ends a prompt to the word behind it.
    """
    length = min(len(ids), len(prompt_ids))
    same = ids[:length] == prompt_ids[:length]
    length = length if same.all() else int(np.argmin(same))
    return Carry(prompt_ids[:length], _NO_IDS, 0)
