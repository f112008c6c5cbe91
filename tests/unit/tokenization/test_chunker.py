"""Texts cut into chunks of tokens, whole and in parts."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import tokenizers

from fletcher.core.batches import TextBatch, TokenBatch
from fletcher.core.chunking import Chunking
from fletcher.errors import InvalidCommandError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.pipeline.input.text_parts import part_ends
from fletcher.tokenization.chunker import chunk_bounds
from fletcher.tokenization.sentences import _ends, levels
from fletcher.tokenization.tokenizer import Tokenizer

WORDS = "the programs, that people use; packages (debian) hold 1 or 22 of them.".split()
TEXT = " ".join(WORDS[n * 7 % len(WORDS)] for n in range(400)) + "\n\n  the end "

BEGINNINGS = ("The use", "It is", "Programs hold", "Grüße", "世界")
PROSE = (
    "The use of it, e.g. 22 of them, is on. It is so! Programs hold on. 世界。Grüße to Mr. Hold. "
    "Programs hold 1.\n\nGrüße. "
) * 9 + "The use"
# Parts of this end where sentences do: what ends there is told by the part before.
SHORT = "  Is! Of. It? Hold. \n\nIt. " * 30


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: ModelBundle) -> Tokenizer:
    return Tokenizer.from_bundle(tiny_bundle.folder)


def batch(texts: list[str], how: str, prompt: str = "") -> TextBatch:
    data = [text.encode() for text in texts]
    chunking = Chunking.from_text(how)
    assert chunking is not None
    return TextBatch(
        b"".join(data), np.cumsum([0, *map(len, data)]), prompt=prompt, chunking=chunking
    )


def rows(tokens: TokenBatch) -> list[list[int]]:
    return [one.tolist() for one in np.split(tokens.input_ids, tokens.offsets[1:-1])]


def in_parts(tokenizer: Tokenizer, whole: TextBatch, max_bytes: int) -> list[TokenBatch]:
    data, found, first, carry = bytes(whole.data), [], 0, None
    for last in part_ends(data, max_bytes):
        part = replace(
            whole,
            data=data[first:last],
            offsets=np.array([0, last - first]),
            continued=last < len(data),
            carry=carry,
        )
        found.append(tokenizer.encode(part))
        first, carry = last, found[-1].carry
    assert carry is None
    return found


@pytest.mark.parametrize(("room", "overlap"), [(4, 0), (4, 1), (4, 3), (1, 0), (7, 2)])
def test_chunks_are_full_and_end_with_the_text(room: int, overlap: int) -> None:
    for num_tokens in range(40):
        found, *_ = chunk_bounds(num_tokens, room, overlap, continued=False)
        count = 1 if num_tokens <= room else 1 + -(-(num_tokens - room) // (room - overlap))
        assert len(found) == count
        assert [last - first for first, last in found[:-1]] == [room] * (count - 1)
        assert [first for first, _ in found] == [n * (room - overlap) for n in range(count)]
        assert found[-1][1] == num_tokens


def test_a_sentence_that_does_not_fit_behind_the_overlap_does_without() -> None:
    breaks = [np.array([3, 4, 13])]
    found, *_ = chunk_bounds(20, 9, 3, breaks, continued=False)
    assert found == [(0, 4), (4, 13), (13, 20)]
    found, rest, covered = chunk_bounds(10, 9, 3, breaks, continued=True)
    assert (found, rest, covered) == ([(0, 4)], 3, 1)
    later = [breaks[0][1:] - 3]
    assert chunk_bounds(17, 9, 3, later, covered=1, continued=False)[0] == [(1, 10), (10, 17)]


@pytest.mark.parametrize("how", ["tokens:8/0", "tokens:20/5", "tokens:32/29", "tokens:32"])
def test_chunks_cover_the_tokens_of_the_text(tokenizer: Tokenizer, how: str) -> None:
    prompt = "22 use: " if "20" in how else ""
    whole = batch(["of", TEXT, "", "a b"], how, prompt)
    tokens = tokenizer.encode(whole)
    assert tokens.chunks is not None
    assert whole.chunking is not None
    long = replace(whole, chunking=None, max_length=None)
    head = rows(Tokenizer(tokenizer._tokenizer, max_length=10_000).encode(long))
    start = head[2][:-1]  # of the text that is empty: [CLS] and the prompt
    assert head[1][: len(start)] == start
    text = head[1][len(start) : -1]
    room = whole.chunking.size - len(start) - 1
    expected, *_ = chunk_bounds(len(text), room, whole.chunking.overlap, continued=False)
    found = rows(tokens)
    first, last = tokens.chunks.offsets[1:3]
    assert found[first:last] == [[*start, *text[a:b], head[1][-1]] for a, b in expected]
    assert tokens.chunks.index[first:last].tolist() == list(range(len(expected)))
    assert tokens.chunks.num_tokens[first:last].tolist() == [b - a for a, b in expected]
    assert max(map(len, found)) == whole.chunking.size
    # A text of one chunk is what it is without chunking.
    assert [found[0], found[-2]] == [head[0], head[2]]


@pytest.mark.parametrize("max_bytes", [12, 50, 333, 5000])
@pytest.mark.parametrize("prompt", ["", "22 use: "])
def test_in_parts_a_text_has_the_same_chunks(
    tokenizer: Tokenizer, max_bytes: int, prompt: str
) -> None:
    whole = batch([TEXT], "tokens:13/4", prompt)
    parts = in_parts(tokenizer, whole, max_bytes)
    assert len(parts) >= len(TEXT) // max_bytes
    together = [row for part in parts if part.num_texts for row in rows(part)]
    assert together == rows(tokenizer.encode(whole))
    index = [one for part in parts if part.chunks for one in part.chunks.index]
    assert index == list(range(len(together)))


@pytest.mark.parametrize("max_bytes", [8, 25, 50, 333])
@pytest.mark.parametrize(
    "how",
    [
        "sentences:20/8",
        "paragraphs:25/5:none",
        "sentences:16:none",
        "each-sentence:12:hierarchical",
        "each-paragraph:20:none",
    ],
)
def test_in_parts_sentences_are_the_same(tokenizer: Tokenizer, how: str, max_bytes: int) -> None:
    whole = batch([PROSE if max_bytes > 20 else SHORT], how)
    parts = in_parts(tokenizer, whole, max_bytes)
    expected = tokenizer.encode(whole)
    assert [row for part in parts if part.num_texts for row in rows(part)] == rows(expected)
    text_ranges = [part.chunks.text_ranges for part in parts if part.chunks is not None]
    assert expected.chunks is not None
    assert np.concatenate(text_ranges).tolist() == expected.chunks.text_ranges.tolist()
    begins = [part.chunks.begins for part in parts if part.chunks is not None]
    assert np.concatenate(begins).tolist() == expected.chunks.begins.tolist()


def chunk_texts(tokenizer: Tokenizer, text: str, how: str) -> list[str]:
    chunks = tokenizer.encode(batch([text], how)).chunks
    assert chunks is not None
    data = text.encode()
    assert [text[a:b] for a, b in chunks.text_ranges[:, :2]] == [
        data[a:b].decode() for a, b in chunks.text_ranges[:, 2:]
    ]
    return [text[a:b] for a, b in chunks.text_ranges[:, :2].tolist()]


def test_chunks_begin_with_sentences(tokenizer: Tokenizer) -> None:
    found = chunk_texts(tokenizer, PROSE, "sentences:32:none")
    assert "".join(found) == PROSE
    assert all(one.startswith(BEGINNINGS) for one in found)
    assert max(one.count(".") for one in found) > 1  # several that fit go together
    found = chunk_texts(tokenizer, PROSE, "sentences:32/12:none")
    assert all(one.startswith(BEGINNINGS) for one in found)
    assert any(a.endswith(b[: b.index(".") + 2]) for a, b in pairwise(found))
    chunks = tokenizer.encode(batch([PROSE], "sentences:32/12:none")).chunks
    assert chunks is not None
    assert (np.diff(chunks.text_ranges[:, 1]) > 0).all()  # each has something new


def test_chunks_are_whole_paragraphs_where_they_fit(tokenizer: Tokenizer) -> None:
    assert chunk_texts(tokenizer, " \n Go on. ", "paragraphs:16:none") == [" \n Go on. "]
    text = "Go on.\n\nUse it. Or not.\n \nThe end"
    assert chunk_texts(tokenizer, text, "paragraphs:16:none") == [
        "Go on.\n\n",
        "Use it. Or not.\n \n",
        "The end",
    ]
    assert chunk_texts(tokenizer, text, "paragraphs:10:none")[1:3] == ["Use it. ", "Or not.\n \n"]


def test_each_sentence_or_paragraph_is_a_chunk_by_itself(tokenizer: Tokenizer) -> None:
    text = "Go on. It is. 1.\n\nUse it. Or not.\n \nThe end"
    sentences = ["Go on. ", "It is. ", "1.\n\n", "Use it. ", "Or not.\n \n", "The end"]
    assert chunk_texts(tokenizer, text, "each-sentence:32:none") == sentences
    paragraphs = ["Go on. It is. 1.\n\n", "Use it. Or not.\n \n", "The end"]
    assert chunk_texts(tokenizer, text, "each-paragraph:32:none") == paragraphs
    # What is too long: a paragraph between sentences, a sentence anywhere.
    found = chunk_texts(tokenizer, text, "each-paragraph:11:none")
    assert found == ["Go on. It is. ", "1.\n\n", "Use it. ", "Or not.\n \n", "The end"]
    assert chunk_texts(tokenizer, text, "each-sentence:5:none")[:2] == ["Go o", "n. "]
    chunks = tokenizer.encode(batch([text, "On it. 1"], "each-sentence:32")).chunks
    assert chunks is not None
    assert np.flatnonzero(chunks.begins).tolist() == [0, 3, 5, 6]


LATE = ["tokens:12/2:none:late", "sentences:14/4:late", "each-paragraph:late", "tokens:32:late"]


@pytest.mark.parametrize("how", LATE)
def test_late_chunks_are_the_same_read_with_what_is_around_them(
    tokenizer: Tokenizer, how: str
) -> None:
    texts = ["1", PROSE, "", "Go on. 1\n\nOf it."]
    given = batch(texts, how, "22 use: ")
    assert given.chunking is not None
    chunking = given.chunking.fitted(32, 6)
    given = replace(given, chunking=chunking)
    found = tokenizer.encode(given)
    early = tokenizer.encode(replace(given, chunking=replace(chunking, late=False)))
    assert found.chunks is not None
    assert early.chunks is not None
    for name in ("offsets", "index", "num_tokens", "text_ranges", "begins"):
        assert np.array_equal(getattr(found.chunks, name), getattr(early.chunks, name))
    spans = found.spans
    assert spans is not None
    read, alone = rows(found), rows(early)
    head = len(alone[-1]) - 1 - int(early.chunks.num_tokens[-1])
    row_of = np.repeat(np.arange(len(read)), spans.counts)
    assert max(map(len, read)) <= 32
    first_ones, last_ones = early.chunks.offsets[:-1], early.chunks.offsets[1:] - 1
    for chunk, (row, (a, b)) in enumerate(zip(row_of, spans.bounds, strict=True)):
        # With the text's first and last chunk go the tokens that are not the text's.
        skipped = 0 if chunk in first_ones else head
        behind = 0 if chunk in last_ones else 1
        assert read[row][a:b] == alone[chunk][skipped : len(alone[chunk]) - behind]
    # A text that fits is one row, and one of one chunk is what it is without chunking.
    assert spans.counts[-1] == len(early.chunks.text_ranges[early.chunks.offsets[-2] :])
    (whole,) = rows(tokenizer.encode(replace(batch(texts[:1], how, "22 use: "), chunking=None)))
    assert read[0] == whole
    assert spans.bounds[0].tolist() == [0, len(whole)]


@pytest.mark.parametrize("max_bytes", [8, 25, 120])
@pytest.mark.parametrize("how", LATE)
def test_in_parts_late_chunks_are_the_same(tokenizer: Tokenizer, how: str, max_bytes: int) -> None:
    whole = batch([PROSE if max_bytes > 20 else SHORT], how)
    assert whole.chunking is not None
    whole = replace(whole, chunking=whole.chunking.fitted(32, 2))
    expected, parts = tokenizer.encode(whole), in_parts(tokenizer, whole, max_bytes)
    assert expected.chunks is not None
    assert expected.spans is not None
    assert [row for part in parts if part.num_texts for row in rows(part)] == rows(expected)
    for name in ("counts", "bounds"):
        found = [getattr(part.spans, name) for part in parts]
        assert np.concatenate(found).tolist() == getattr(expected.spans, name).tolist()
    text_ranges = [part.chunks.text_ranges for part in parts if part.chunks is not None]
    assert np.concatenate(text_ranges).tolist() == expected.chunks.text_ranges.tolist()
    carried = [len(part.carry.input_ids) for part in parts if part.carry is not None]
    assert max(carried) < 4 * 32


def test_a_text_without_tokens_has_a_late_chunk() -> None:
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 1, "[UNK]": 2}, "[UNK]"))
    found = Tokenizer(bare, max_length=8, pad_token_id=3).encode(batch(["", "a"], "tokens:4:late"))
    assert found.input_ids.tolist() == [3, 1]
    assert found.spans is not None
    assert found.spans.bounds.tolist() == [[0, 1], [0, 1]]


def test_a_long_sentence_is_cut_anywhere(tokenizer: Tokenizer) -> None:
    text = "On it. " + "1 2 3 4 5 6 " * 9 + "7. On it."
    found = chunk_texts(tokenizer, text, "sentences:12:none")
    assert "".join(found) == text
    assert found[0] == "On it. "
    assert found[1] == "1 2 3 4 5 6 1 2 3 4 "


@pytest.mark.parametrize(
    ("text", "beginnings"),
    [
        ("One. Two! Three? “Four.” Five… Six", ["Two", "Three", "“Four", "Five", "Six"]),
        ("Mr. Smith, e.g. A. B. Smith, has 3.14. Yes", ["Yes"]),
        ("it ended. but went on", []),
        ("一。二。「三。」四", ["二", "「三", "四"]),
        ("One\n\nTwo\n three", ["Two"]),
        ("One.Two", []),
        ("One. ", []),
    ],
)
def test_where_sentences_begin(text: str, beginnings: list[str]) -> None:
    found = levels("", text, np.arange(1, len(text) + 1))
    places = np.flatnonzero(found).tolist()
    assert [
        text[place:].startswith(one) for place, one in zip(places, beginnings, strict=True)
    ] == [True] * len(beginnings)
    for cut_at in range(len(text)):  # and in two parts
        second = levels(text[:cut_at], text[cut_at:], np.arange(1, len(text) - cut_at + 1))
        assert second.tolist() == found[cut_at:].tolist()


# As they are most plainly written, where time does not matter and a text does not end with them.
PLAIN_SENTENCE = re.compile(
    r"""(?:[.!?…]+["'”’»)\]]*\s+|[。！？｡]+[」』）”’]*\s*)(?=\S)"""  # noqa: RUF001
)
PLAIN_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*(?=\S)")


def test_sentences_and_paragraphs_are_those_of_plain_patterns() -> None:
    random = Random(5)
    for _ in range(5000):
        text = "".join(random.choices('.!…。？」”)"\n\n  \tAb', k=random.randrange(14)))  # noqa: RUF001
        text += random.choice(("A", " A", "\n\nA"))
        expected = np.zeros(len(text), np.int8)
        for pattern, level in ((PLAIN_SENTENCE, 1), (PLAIN_PARAGRAPH, 2)):
            for match in pattern.finditer(text):
                if level == 2 or _ends(text, match):
                    expected[match.end()] = level
        found = levels("", text, np.arange(1, len(text) + 1))
        assert found.tolist() == expected.tolist(), repr(text)


@pytest.mark.parametrize("text", [".", "\n", "\n \n", "。", ".)", " .", "\n\t"])
def test_no_text_takes_a_time_beyond_its_length(text: str) -> None:
    started_s = time.process_time()
    for end in ("", "a", " "):
        levels("", text * 100_000 + end, np.arange(1, 2))
    # With every place tried again it is a minute or more.
    assert time.process_time() - started_s < 10


def test_parts_end_before_words_or_else_between_characters() -> None:
    assert part_ends(b"one two, three", 8) == [3, 8, 14]
    assert part_ends(b"one two three", 100) == [13]
    assert part_ends("三四五六七".encode(), 7) == [6, 12, 15]
    assert part_ends(b"a, b. c", 4) == [2, 5, 7]
    assert part_ends("да ты но!".encode(), 7) == [4, 9, 15]
    assert part_ends("e\u0301 a b".encode(), 6) == [5, 7]  # no letter, but a mark, is before it
    for size in range(4, 40):
        data = (TEXT + "ä三🙂" * 30).encode()
        ends = part_ends(data, size)
        assert ends[-1] == len(data)
        assert all(0 < b - a <= size for a, b in zip([0, *ends], ends, strict=False))
        for end in ends:
            data[:end].decode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("words:3", "unknown method"),
        ("tokens:8/8", "OVERLAP 8 is not below SIZE"),
        ("tokens:0", "SIZE is 0"),
        ("tokens:8:sum", "unknown aggregation"),
        ("tokens:8:mean:9", "'9' is unexpected"),
        ("tokens:mean:8", "'8' is unexpected"),
        ("none:mean", "unknown method"),
        ("each-sentence:16/4", "OVERLAP is 4"),
        ("sentences:16:hierarchical", "hierarchical needs chunks within a paragraph"),
        ("tokens:late", "need a SIZE"),
        ("late", "unknown method"),
        ("tokens:8:late:mean", "unknown aggregation"),
        ("tokens:8:none:late:late", "'late' is unexpected"),
        ("", "unknown method"),
    ],
)
def test_what_is_no_chunking_is_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidCommandError, match=said) as caught:
        Chunking.from_text(text)
    assert caught.value.field == "chunking"
    assert caught.value.allowed


def test_a_chunking_reads_as_it_is_written() -> None:
    for text in ("tokens:256/32:mean", "tokens:8/0:max", "each-sentence:hierarchical:late"):
        assert str(Chunking.from_text(text)) == text
    assert Chunking.from_text("tokens") == Chunking("tokens", 0, 0, "mean")
    assert Chunking.from_text("none") is None


def test_a_chunk_must_have_room_and_fit_the_model() -> None:
    assert Chunking("tokens").fitted(32, 2).size == 32
    assert Chunking("tokens", 8, 5).fitted(32, 2).size == 8
    for size, overlap, taken in ((33, 0, 2), (8, 6, 2), (8, 0, 8), (0, 30, 2)):
        with pytest.raises(InvalidCommandError, match="SIZE is") as caught:
            Chunking("tokens", size, overlap).fitted(32, taken)
        assert caught.value.field == "chunking"


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer: Tokenizer) -> None:
    # It ended in no memory: chunks that do not advance never end.
    with pytest.raises(InvalidCommandError, match="SIZE is"):
        tokenizer.encode(batch([TEXT], "tokens:8/4", "22 use: "))
