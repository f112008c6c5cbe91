"""What a model reads at once of a text whose chunks are pooled late.

A text that it cannot read whole is read in frames, which overlap so that each chunk lies whole in
one of them, with an eighth of it on either side or as much as there is room for
(https://arxiv.org/abs/2409.04701, "long late chunking").
"""

from __future__ import annotations

from collections.abc import Sequence

# Of a frame: more is more to read twice, less is less that the first and last of its chunks know.
_CONTEXT = 8


def context(room: int) -> int:
    """Tokens before a chunk that its frame has at most, unless it is the first one of them."""
    return room // _CONTEXT


def frames(
    chunks: Sequence[tuple[int, int]], num_tokens: int, room: int, size: int, *, continued: bool
) -> list[tuple[int, int, int]]:
    """The frames of some chunks, whatever part of the text is there: the same as of the whole.

    Args:
        chunks: First token of each and the first behind it, ascending; all that end in `num_tokens`
            or begin `size` before that.
        num_tokens: Tokens there are, from the text's beginning or `context` before the first chunk.
        room: Tokens of a frame.
        size: Tokens of a chunk at most, no more than `room`.
        continued: More come. A frame is complete when no chunk that begins in it is still to come.

    Returns:
        First token, the first behind it, and how many chunks are in it: as many as come next of
        those that have enough around them.
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
