"""Frames of a text for late chunking: the tokens that a model reads in one row.

A text longer than the model's input is read in several frames. Frames overlap, so that each chunk
lies completely within one frame. If there is room, an eighth of the frame is context on either side
of its chunks (https://arxiv.org/abs/2409.04701, "long late chunking").
"""

from __future__ import annotations

from collections.abc import Sequence

# Frame size, divided by the size of the context on either side. With a larger context, more tokens
# are read twice. With a smaller one, the first and last chunk of a frame see less of the text.
_CONTEXT = 8


def context(room: int) -> int:
    """Returns the most tokens that a frame has before its first chunk."""
    return room // _CONTEXT


def frames(
    chunks: Sequence[tuple[int, int]], num_tokens: int, room: int, size: int, *, continued: bool
) -> list[tuple[int, int, int]]:
    """Returns the frames of some chunks.

    A text that comes in parts gets the same frames as the whole text.

    Args:
        chunks: First and end token (exclusive) of each chunk, ascending. Contains all chunks that
            end within `num_tokens`, or start at least `size` tokens before that.
        num_tokens: Number of tokens so far, counted from the start of the text or from `context`
            tokens before the first chunk.
        room: Most tokens of a frame.
        size: Most tokens of a chunk, at most `room`.
        continued: Whether more tokens follow. If so, the last frame is left out until all chunks
            that start in it are known.

    Returns:
        For each frame: its first token, its end token (exclusive), and its number of chunks. A
        frame has the next chunks that have enough context in it.
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
