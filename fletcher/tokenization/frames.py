"""Frames of a text for late chunking: the tokens that a model reads at once.

A text longer than the model's input is read in frames. They overlap, so each chunk lies whole in
one of them, with an eighth of the frame on either side if there is room
(https://arxiv.org/abs/2409.04701, "long late chunking").
"""

from __future__ import annotations

from collections.abc import Sequence

# Frame size per context on either side. Larger contexts make more tokens read twice; smaller ones
# tell the first and last chunk of a frame less.
_CONTEXT = 8


def context(room: int) -> int:
    """Returns the most tokens that a frame has before its first chunk."""
    return room // _CONTEXT


def frames(
    chunks: Sequence[tuple[int, int]], num_tokens: int, room: int, size: int, *, continued: bool
) -> list[tuple[int, int, int]]:
    """Returns the frames of some chunks, for text parts as for the whole text.

    Args:
        chunks: First token of each chunk and the first one after it, ascending; all that end within
            `num_tokens`, or start at least `size` before that.
        num_tokens: Number of tokens so far, from the text's start or `context` before the first
            chunk.
        room: Most tokens of a frame.
        size: Most tokens of a chunk, at most `room`.
        continued: Whether more tokens follow. A frame is complete once all chunks that start in it
            are known.

    Returns:
        For each frame its first token, the first one after it, and its number of chunks: the next
        ones that have enough context.
    """
    found = []
    done = 0
    while done < len(chunks):
        begin, end = chunks[done]
        first = max(0, begin - min(context(room), (room - (end - begin)) // 2))
        last = first + room
        if continued and num_tokens <= last + size:
            break
        behind = done + 1
        limit = num_tokens if last >= num_tokens else last - context(room)
        while behind < len(chunks) and chunks[behind][1] <= limit:
            behind += 1
        found.append((first, min(last, num_tokens), behind - done))
        done = behind
    return found
