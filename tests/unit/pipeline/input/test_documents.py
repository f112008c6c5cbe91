"""Documents in several rows have the chunks of the joined text, however rows and batches end."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers

from fletcher.core.batches import Carry, EmbeddingBatch, TextBatch, TokenBatch
from fletcher.core.chunking import Chunking
from fletcher.core.command import EmbedCommand
from fletcher.core.schema import VectorSpec, output_schema
from fletcher.errors import BatchTooLargeError, FletcherError, InvalidUtf8Error
from fletcher.pipeline.document_assembly import MAX_CHUNK_TEXT_BYTES, DocumentAssembler
from fletcher.pipeline.input.documents import DocumentIntake
from fletcher.pipeline.input.intake import TextTreatment
from fletcher.pipeline.input.limits import IntakeLimits
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.input.text_parts import last_end
from fletcher.tokenization.tokenizer import Tokenizer

FAMILIES = Path(__file__).parents[3] / "golden" / "families"
NAMES = sorted(path.stem for path in FAMILIES.glob("*.parquet"))
LIMITS = IntakeLimits(
    max_message_bytes=8 << 20,
    max_row_bytes=1 << 20,
    slice_rows=1024,
    slice_bytes=1 << 16,
    table_values=8,
    bytes_per_row=100,
)
# Text that a tokenizer may treat in a special way, also across the ends of rows.
WORDS = [
    *("a game for two players. ", "Words, words! Of it? ", "don't ", "1234567 ", "naïve café "),
    *("Привет мир. Да ", "Ǆ ﬁ ½ ", "日本語の文章。", "한국어 ", "e\u0301\u0323 ", "\u200d\u200b"),
    *("😀👍🏽", "\t\n\r\n  ", "\n\n", "\u00a0\u3000", "<s>", "[MASK]", " <mask> ", "▁", "##ing"),
    *("Mr. Go. ", "x" * 120, "<|endoftext|>", "two  spaces ", "🙂 use “packages” "),
]


def document(random: Random, num_words: int) -> str:
    return "".join(random.choice(WORDS) for _ in range(num_words))


def cut(random: Random, text: str, num_slices: int) -> list[str]:
    ends = sorted(random.randrange(len(text) + 1) for _ in range(num_slices - 1))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@dataclass
class Run:
    """An exchange without a server: what comes in is tokenized, and its chunks are rows at once."""

    tokenizer: Tokenizer
    how: str = "tokens:8:none"
    prompt: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    limits: IntakeLimits = LIMITS
    with_text: bool = True
    max_text_bytes: int = MAX_CHUNK_TEXT_BYTES
    schema: pa.Schema = field(
        default_factory=lambda: pa.schema([("id", pa.utf8()), ("text", pa.utf8())])
    )

    def __post_init__(self) -> None:
        chunking = Chunking.from_text(self.how)
        assert chunking is not None
        self.chunking = chunking
        self.carry: Carry | None = None
        self.ids: list[list[int]] = []
        self.errors: list[tuple[int, FletcherError]] = []
        self.intake = DocumentIntake(
            self.schema,
            EmbedCommand(chunking=self.how, continuous=True, **self.options),
            self.limits,
            TextTreatment(prompt=self.prompt, chunking=chunking),
            carry_text=self.with_text,
            small_is_interactive=True,
        )
        spec = VectorSpec("m@0", 2, "float32", 1, "mean", normalized=False, chunking=chunking)
        schema = output_schema(
            spec,
            id_type=self.intake.id_type,
            carried=self.intake.carried_fields,
            text=self.with_text,
        )
        self.assembler = DocumentAssembler(schema, spec, "u", max_text_bytes=self.max_text_bytes)
        self.num_batches = 0
        self.num_rows = 0

    def send(
        self, *rows: tuple[str | None, str | None], ends: bool = False
    ) -> list[dict[str, Any]]:
        columns = list(zip(*rows, strict=True)) or [(), ()]
        arrays = [pa.array(one, pa.utf8()) for one in columns]
        return self.send_batch(pa.record_batch(arrays, self.schema), ends=ends)

    def send_batch(self, batch: pa.RecordBatch, *, ends: bool = False) -> list[dict[str, Any]]:
        self.num_batches += 1
        row_slices = self.intake.row_slices(batch, self.num_batches - 1, self.num_rows, ends=ends)
        found = list(self._rows(row_slices, self.num_batches - 1))
        self.num_rows += batch.num_rows
        return found

    def rest(self) -> list[dict[str, Any]]:
        return list(self._rows(self.intake.rest(), None))

    def _rows(
        self, row_slices: Iterable[RowSlice], batch_id: int | None
    ) -> Iterable[dict[str, Any]]:
        last = None
        for row_slice in row_slices:
            assert last in (None, False)
            assert row_slice.num_bytes > 0
            assert row_slice.batch_id == batch_id
            last = row_slice.last
            output = self.assembler.assemble(row_slice, self._embedded(row_slice))
            assert output is not None
            self.errors += [(row_slice.row_first + row, one) for row, one in output.errors.items()]
            yield from output.batch.drop_columns("timestamp").to_pylist()
        assert last in ((None, True) if batch_id is None else (True,))

    def _embedded(self, row_slice: RowSlice) -> EmbeddingBatch:
        if row_slice.texts.num_texts:
            texts = replace(row_slice.texts, carry=self.carry)
            tokens = self.tokenizer.encode(texts)
            self.carry = tokens.carry
        else:
            tokens = TokenBatch(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.bool_))
        self.ids += rows(tokens)
        count = tokens.num_texts
        return EmbeddingBatch(
            np.ones((count, 2), np.float32),
            None,
            tokens.token_count,
            np.zeros(count, np.bool_),
            {},
            tokens.chunks,
        )


def rows(tokens: TokenBatch) -> list[list[int]]:
    if not tokens.num_texts:
        return []
    return [one.tolist() for one in np.split(tokens.input_ids, tokens.offsets[1:-1])]


def whole(
    tokenizer: Tokenizer, text: str, how: str, prompt: str = ""
) -> tuple[list[list[int]], list[tuple[int, int, int, str]]]:
    """Tokens, index, place and text of a document's chunks."""
    data = text.encode()
    texts = TextBatch(
        data, np.array([0, len(data)]), prompt=prompt, chunking=Chunking.from_text(how)
    )
    tokens = tokenizer.encode(texts)
    assert tokens.chunks is not None
    spans = tokens.chunks.text_ranges[:, :2].tolist()
    return rows(tokens), [(n, a, b, text[a:b]) for n, (a, b) in enumerate(spans)]


def places(found: Iterable[dict[str, Any]]) -> list[tuple[int, int, int, str]]:
    return [
        (row["chunk_index"], row["chunk_start"], row["chunk_end"], row["text"]) for row in found
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return of_family("distilbert")


def of_family(name: str) -> Tokenizer:
    path = str(FAMILIES / name / "tokenizer.json")
    return Tokenizer(tokenizers.Tokenizer.from_file(path), max_length=128)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_are_those_of_the_joined_text(name: str) -> None:
    random = Random(name)
    tokenizer = of_family(name)
    hows = ["tokens:12/3:none", "sentences:24/8:none", "paragraphs:32:none", "tokens:9:none"]
    hows.append("each-sentence:24:none")
    for number in range(10):
        how, prompt = hows[number % 5], "query: " if number % 3 == 0 else ""
        texts = [document(random, random.randrange(1, 60)) for _ in range(3)]
        run = Run(tokenizer, how, prompt)
        sent = [
            (str(n), row_slice)
            for n, text in enumerate(texts)
            for row_slice in cut(random, text, random.choice([1, 2, 5, len(text)]))
        ]
        found: list[dict[str, Any]] = []
        while sent:  # in batches of any number of rows
            size = random.choice([1, 1, 2, 7])
            found += run.send(*sent[:size])
            sent = sent[size:]
        found += run.rest()
        expected = [whole(tokenizer, text, how, prompt) for text in texts]
        assert run.ids == [ids for one, _ in expected for ids in one]
        for n, (_, one) in enumerate(expected):
            assert places(row for row in found if row["id"] == str(n)) == one
        assert not run.errors


def test_a_chunk_leaves_when_no_text_behind_it_can_change_it(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer, "tokens:12:none")
    text = "a game for two players, of two or three rounds; each takes an hour. " * 3
    _, expected = whole(tokenizer, text, "tokens:12:none")
    found: list[dict[str, Any]] = []
    for end in range(1, len(text) + 1):
        found += run.send(("a", text[end - 1 : end]))
        # What is before a space between two words is settled, and a token of it ends the chunk.
        settled = last_end(text[:end].encode(), 4096)
        assert places(found) == [chunk for chunk in expected if chunk[2] < settled]
    found += run.send(ends=True)
    assert places(found) == expected
    assert run.send(ends=True) == run.rest() == []


def test_documents_end_with_another_id_or_where_it_is_said(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer)
    found = run.send(("a", "of "), ("a", "it"), ("b", ""), ("c", "on"), ("c", "e"))
    assert [(row["id"], row["text"]) for row in found] == [("a", "of it"), ("b", "")]
    found = run.send(("c", "!"), ends=True)
    assert [(row["id"], row["text"]) for row in found] == [("c", "one!")]
    assert run.send(("c", "again")) == []
    (row,) = run.rest()
    assert (row["id"], row["text"], row["chunk_index"], row["chunk_start"]) == ("c", "again", 0, 0)
    assert run.rest() == []


def test_a_document_that_is_all_there_is_one_part(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer)
    ids, texts = ["a", "b", "b", "c", "d"], ["of it", "", "one of them", "", "it is"]
    row_slices = [
        *run.intake.row_slices(pa.record_batch([ids, texts], run.schema), 0, 0, ends=True)
    ]
    found = [
        (row_slice.texts.data, row_slice.texts.continued, row_slice.part)
        for row_slice in row_slices
    ]
    assert found == [(text, False, 0) for text in (b"of it", b"one of them", b"", b"it is")]
    assert [*run.intake.rest()] == []


def test_without_ids_all_is_one_document_until_it_ends(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer, schema=pa.schema([("text", pa.large_utf8())]))
    batch = pa.record_batch([pa.array(["on", "e t"], pa.large_utf8())], run.schema)
    assert run.send_batch(batch) == []
    (row,) = run.send_batch(batch.slice(1), ends=True)
    assert (row["id"], row["text"]) == ("u:0", "one te t")
    assert run.send_batch(batch) == []
    (row,) = run.rest()
    assert (row["id"], row["text"]) == ("u:3", "one t")


@pytest.mark.parametrize("kind", ["dictionary", "view", "slice"])
def test_pieces_are_of_any_string_type(tokenizer: Tokenizer, kind: str) -> None:
    texts = ["x", "one ", "two", " three" * 20, "", "one "]
    column = pa.array(texts)
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind == "view":
        column = column.cast(pa.string_view())
    run = Run(tokenizer, schema=pa.schema([("text", column.type)]))
    found = run.send_batch(pa.record_batch([column], run.schema).slice(1), ends=True)
    assert "".join(row["text"] for row in found) == "".join(texts[1:])


def test_columns_are_those_of_a_documents_first_row(tokenizer: Tokenizer) -> None:
    schema = pa.schema([("id", pa.int64()), ("text", pa.utf8()), ("n", pa.int32())])
    run = Run(tokenizer, schema=schema, options={"columns": ("n",)})
    first = pa.record_batch([pa.array([7, 7, 8]), pa.array(["a", "b", "c"]), [1, 2, 3]], schema)
    second = pa.record_batch([pa.array([8, 9]), pa.array(["d", "e"]), [4, None]], schema)
    found = [*run.send_batch(first), *run.send_batch(second), *run.rest()]
    assert [(row["id"], row["text"], row["n"]) for row in found] == [
        *((7, "ab", 1), (8, "cd", 3), (9, "e", None))
    ]


@pytest.mark.parametrize(
    ("bad", "code"),
    [(None, "invalid_command"), ("x" * 2000, "row_too_large")],
)
@pytest.mark.parametrize("begun", [True, False])
def test_a_piece_that_cannot_be_read_fails_its_document(
    tokenizer: Tokenizer, bad: str | None, code: str, begun: bool
) -> None:
    run = Run(tokenizer, limits=replace(LIMITS, max_row_bytes=1000))
    found = run.send(("a", "before"), ends=True)
    if begun:
        found += run.send(("b", "one two three four five six seven eight nine"))
        assert found.pop(1)["chunk_index"] == 0
        del found[1:]
    found += run.send(("b", bad), ("b", "dropped"), ("c", "of "))
    found += run.send(("c", "c"), ("b", "another"))
    found += run.rest()
    shown = [(row["id"], row["text"], row["vector"] is None) for row in found]
    assert shown == [
        ("a", "before", False),
        ("b", None, True),
        ("c", "of c", False),
        ("b", "another", False),
    ]
    assert [(row, error.code) for row, error in run.errors] == [(1, code)]


def test_what_came_before_the_mistake_goes_on_in_whatever_batch(tokenizer: Tokenizer) -> None:
    rows = [("a", "one two three four five six seven eight "), ("a", "nine"), ("a", None)]
    together, apart = Run(tokenizer), Run(tokenizer)
    found = together.send(*rows)
    assert [row["chunk_index"] for row in found[:2]] == [0, 1]
    assert found[-1]["chunk_index"] is None
    assert [row for one in rows for row in apart.send(one)] == found
    assert [row for row, _ in together.errors] == [row for row, _ in apart.errors] == [0]


def test_one_mistake_of_a_document_is_enough(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer, schema=pa.schema([("text", pa.utf8())]))
    nothing = pa.record_batch([pa.nulls(20_000, pa.utf8())], run.schema)
    tracemalloc.start()
    try:
        assert len(run.send_batch(nothing)) == 1
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100 * 20_000  # an error takes 400


def test_a_row_whose_id_is_null_fails_alone(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer)
    found = run.send(("a", "one"), (None, "two"), (None, "three"), ("a", "four"))
    found += run.send((None, "five")) + run.send((None, "six")) + run.rest()
    assert [(row["id"], row["text"]) for row in found] == [
        *(("a", "one"), (None, None), (None, None), ("a", "four"), (None, None), (None, None))
    ]
    assert [row for row, _ in run.errors] == [1, 2, 4, 5]


def test_a_document_that_lost_a_part_says_it_once(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer)
    lost = BatchTooLargeError("lost")
    words = "one two three four five six seven eight nine "
    found = complete = run.send(("a", words))
    row_slices = [*run.intake.row_slices(pa.record_batch([["a"], [words]], run.schema), 1, 1)]
    for outcome in (lost, lost):
        for row_slice in row_slices:
            output = run.assembler.assemble(row_slice, outcome)
            assert output is not None
            found = found + output.batch.drop_columns("timestamp").to_pylist()
    for row_slice in ("x", "y"):  # the second is no word yet: its answer is empty
        assert run.send(("a", row_slice)) == []  # nothing of it, and what was said stays so
    found += run.send(("a", words), ("b", "of"), ends=True)
    shown = [(row["id"], row["chunk_index"]) for row in found]
    before = [("a", n) for n in range(len(shown) - 2)]
    assert len(before) == len(complete) > 0
    assert shown == [*before, ("a", None), ("b", 0)]


def test_what_a_batch_holds_is_checked_first(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer, schema=pa.schema([("text", pa.utf8())]))
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    with pytest.raises(InvalidUtf8Error):
        run.send_batch(pa.record_batch([bad], run.schema))


def test_small_batches_overtake_bulk_work_and_large_ones_do_not(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer)
    small = pa.record_batch([["a"], ["of it"]], run.schema)
    large = pa.record_batch([["a"] * 40, ["of it "] * 40], run.schema)
    assert {row_slice.priority for row_slice in run.intake.row_slices(small, 0, 0)} == {
        "interactive"
    }
    assert {row_slice.priority for row_slice in run.intake.row_slices(large, 1, 1)} == {"bulk"}


def test_what_is_held_does_not_depend_on_the_length(tokenizer: Tokenizer) -> None:
    random = Random(3)
    run = Run(tokenizer, "tokens:128/16:none")
    spaced, unspaced = "A game for two players, or for 3. " * 1000, "漢字かな" * 3000
    num_chunks = 0
    for number in range(40):
        for row_slice in cut(random, unspaced if number % 20 == 7 else spaced, 4):
            num_chunks += len(run.send(("a", row_slice)))
            run.ids.clear()
            assert run.intake._document is not None
            assert len(run.intake._document.held) <= 4096
            assert len(run.assembler._kept_text) < 60_000
            assert run.carry is None or len(run.carry.input_ids) < 128
    assert run.carry is not None
    assert run.carry.size[0] > 1_200_000
    assert num_chunks > 4_000


def test_a_chunk_of_white_space_without_end_fails(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer, max_text_bytes=20_000)
    found = run.send(("a", "one two"))
    for _ in range(10):
        found += run.send(("a", " " * 9000))
        assert len(run.assembler._kept_text) < 40_000
    found += run.send(("a", "three"), ("b", "of"), ends=True)
    assert [(row["id"], row["text"]) for row in found] == [("a", None), ("b", "of")]
    assert [error.code for _, error in run.errors] == ["row_too_large"]
