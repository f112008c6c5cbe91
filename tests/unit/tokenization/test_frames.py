"""What a model reads at once of texts whose chunks are pooled late."""

from __future__ import annotations

from random import Random

import pytest

from fletcher.tokenization.frames import context, frames


def random_chunks(random: Random, size: int, num_tokens: int) -> list[tuple[int, int]]:
    """Chunks that leave nothing out, of any sizes, some with an overlap."""
    found = [(0, min(num_tokens, random.randint(1, size)))]
    while found[-1][1] < num_tokens:
        first, last = found[-1]
        begin = random.randint(max(first + 1, last - 3), last)
        found.append((begin, min(num_tokens, max(last + 1, begin + random.randint(1, size)))))
    return [(a, min(b, a + size)) for a, b in found]


@pytest.mark.parametrize("room", [8, 17, 64])
def test_each_chunk_lies_in_a_frame_with_as_much_around_it_as_there_is(room: int) -> None:
    random = Random(room)
    for _ in range(300):
        size, num_tokens = random.randint(1, room), random.randint(1, 6 * room)
        chunks = random_chunks(random, size, num_tokens)
        found = frames(chunks, num_tokens, room, size, continued=False)
        assert sum(count for *_, count in found) == len(chunks)
        assert all(count > 0 for *_, count in found)
        assert found[0][0] == 0
        assert found[-1][1] == num_tokens
        rest = iter(chunks)
        for first, last, count in found:
            own = [next(rest) for _ in range(count)]
            assert last - first <= room
            for begin, end in own:
                assert first <= begin < end <= last
                least = min(context(room), (room - (end - begin)) // 2)
                assert first == 0 or begin - first >= least
                assert last == num_tokens or last - end >= least


def test_a_text_that_can_be_read_whole_is() -> None:
    chunks = [(n, n + 4) for n in range(0, 64, 4)]
    assert frames(chunks, 64, 64, 4, continued=False) == [(0, 64, 16)]
    # And from the middle on, what is before a frame's first chunk is no more than an eighth.
    assert frames(chunks, 64, 32, 4, continued=False) == [(0, 32, 7), (24, 56, 6), (48, 64, 3)]


@pytest.mark.parametrize("room", [8, 17, 64])
def test_frames_of_parts_are_those_of_the_whole(room: int) -> None:
    random = Random(room)
    for _ in range(300):
        size, num_tokens = random.randint(1, room), random.randint(1, 6 * room)
        chunks = random_chunks(random, size, num_tokens)
        expected = frames(chunks, num_tokens, room, size, continued=False)
        found: list[tuple[int, int, int]] = []
        done = kept = there = 0
        while there < num_tokens:
            there = min(num_tokens, there + random.randint(1, 2 * room))
            continued = there < num_tokens
            # As many as are known to be complete.
            known = [one for one in chunks[done:] if not continued or one[0] + size < there]
            known = [(a - kept, b - kept) for a, b in known]
            part = frames(known, there - kept, room, size, continued=continued)
            found += [(a + kept, b + kept, count) for a, b, count in part]
            done += sum(count for *_, count in part)
            if done < len(chunks):
                kept = max(kept, chunks[done][0] - context(room))
        assert found == expected
