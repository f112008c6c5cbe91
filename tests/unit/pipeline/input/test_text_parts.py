"""Texts that pass in parts: each waits for the one before, and fails with it."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from fletcher.core.batches import Carry, Chunks, EmbeddingBatch, TextBatch, TokenBatch
from fletcher.core.chunking import Chunking
from fletcher.core.command import EmbedCommand
from fletcher.core.schema import VectorSpec, output_schema
from fletcher.errors import FletcherError, InternalError, RowTooLargeError
from fletcher.pipeline.chunk_assembly import ChunkAssembler
from fletcher.pipeline.input.intake import Intake, TextTreatment
from fletcher.pipeline.input.limits import IntakeLimits
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.pipeline.stream import EmbedStream, StreamTicket

HOW = Chunking("tokens", 8, 2, "none")
NOTHING = np.zeros(0, np.int32)
PLACES = np.zeros((0, 2), np.int64)
ERROR = InternalError("lost")


def carry(number: int) -> Carry:
    return Carry(
        NOTHING, NOTHING, PLACES, np.zeros(0, np.int8), "", np.zeros(2, np.int64), number, 0
    )


def tokens(number: int) -> TokenBatch:
    return TokenBatch(NOTHING, np.zeros(1, np.int64), np.zeros(0, np.bool_), carry=carry(number))


def stream() -> tuple[EmbedStream, list[StreamTicket]]:
    begun: list[StreamTicket] = []
    return EmbedStream(MemoryBudget(1 << 20, 2).open_allowance(), begun.append), begun


def part(*, continued: bool) -> TextBatch:
    return TextBatch(b"text", np.array([0, 4]), chunking=HOW, continued=continued)


def test_a_part_goes_on_where_the_one_before_ended() -> None:
    one, begun = stream()
    for number in range(4):
        one.submit(part(continued=number < 3), number, num_bytes=1)
    one.submit(part(continued=False), "other", num_bytes=1)
    assert [ticket.context for ticket in begun] == [0, "other"]
    begun[0].tokenized(tokens(7))
    assert begun[2].context == 1
    assert begun[2].texts.carry is not None
    assert begun[2].texts.carry.num_chunks == 7
    begun[2].tokenized(tokens(8))
    begun[3].tokenized(tokens(9))
    assert begun[4].context == 3
    begun[4].tokenized(replace(tokens(0), carry=None))
    assert len(begun) == 5
    # And when it is there already before the next part comes.
    one.submit(part(continued=True), 5, num_bytes=1)
    begun[5].tokenized(tokens(3))
    one.submit(part(continued=False), 6, num_bytes=1)
    carried = begun[6].texts.carry
    assert carried is not None
    assert carried.num_chunks == 3


def test_a_text_goes_on_behind_submissions_of_none() -> None:
    one, begun = stream()
    nothing = TextBatch(b"", np.zeros(1, np.int64), chunking=HOW)
    one.submit(part(continued=True), 0, num_bytes=1)
    one.submit(nothing, 1, num_bytes=1)
    one.submit(part(continued=False), 2, num_bytes=1)
    assert [ticket.context for ticket in begun] == [0, 1]
    begun[0].tokenized(tokens(7))
    assert begun[2].texts.carry is not None
    assert begun[1].texts.carry is None
    # Of a text whose next part is long in coming only what that needs is kept.
    one.submit(part(continued=True), 3, num_bytes=1)
    for ticket in begun:
        ticket.finish(ERROR)
    results = one.results()
    assert [next(results).context for _ in range(4)] == [0, 1, 2, 3]
    forgotten = weakref.ref(begun[3].tokens or begun[3].texts.offsets)
    begun.clear()
    del ticket
    assert forgotten() is None


def test_all_parts_fail_with_one_however_many() -> None:
    one, begun = stream()
    for number in range(3000):  # more than Python's stack is deep
        one.submit(part(continued=number < 2999), number, num_bytes=1)
    one.submit(part(continued=False), "other", num_bytes=1)
    begun[0].tokenized(ERROR)
    assert [ticket.context for ticket in begun] == [0, "other"]
    begun[1].finish(ERROR)
    one.end()
    assert [result.embeddings for result in one.results()] == [ERROR] * 3001
    # Parts that come when it failed already.
    one, begun = stream()
    for number in range(3):
        one.submit(part(continued=number < 2), number, num_bytes=1)
        if number == 0:
            begun[0].tokenized(ERROR)
    one.end()
    assert [result.embeddings for result in one.results()] == [ERROR] * 3


def row_slices_of(
    texts: list[str | None], taken: int = 0
) -> tuple[list[RowSlice], pa.Schema, VectorSpec]:
    spec = VectorSpec("m@0", 2, "float32", 1, "mean", normalized=False, chunking=HOW)
    batch = pa.record_batch({"text": pa.array(texts, pa.utf8())})
    limits = IntakeLimits(1 << 20, 1 << 20, 4, 1 << 20, 8, 100)
    intake = Intake(
        *(batch.schema, EmbedCommand()),
        limits,
        TextTreatment(chunking=HOW, chunk_overhead=taken),
        carry_text=True,
        small_is_interactive=False,
    )
    schema = output_schema(spec, id_type=pa.utf8(), text=True)
    return list(intake.row_slices(batch, 0, 0)), schema, spec


def one_chunk(first: int, last: int, index: int) -> EmbeddingBatch:
    spans = np.array([[first, last, first, last]], np.int64)
    one, begins = np.ones(1, np.int32), np.array([index == 0])
    chunks = Chunks(np.array([0, 1]), np.array([index], np.int32), one, spans, begins)
    return EmbeddingBatch(
        np.ones((1, 2), np.float32), None, np.ones(1, np.int32), np.zeros(1, np.bool_), {}, chunks
    )


def test_a_text_that_lost_a_part_is_said_to_fail_once() -> None:
    text = "word " * 1000
    row_slices, schema, spec = row_slices_of([text, None, "last"])
    parts = [row_slice for row_slice in row_slices if row_slice.row_first == 0]
    assert len(parts) == 5
    assert [row_slice.last for row_slice in row_slices] == [False] * (len(row_slices) - 1) + [True]
    assert b"".join(bytes(row_slice.texts.data) for row_slice in parts) == text.encode()
    for whole_rows in (False, True):
        assembler = ChunkAssembler(schema, spec, "u", whole_rows=whole_rows)
        found: list[tuple[list[str | None], list[int]]] = []
        for number, row_slice in enumerate(parts):
            outcome: EmbeddingBatch | FletcherError = one_chunk(number, number + 5, number)
            output = assembler.assemble(row_slice, ERROR if number in (1, 3) else outcome)
            if output is not None:
                found.append((output.batch.column("text").to_pylist(), sorted(output.errors)))
        if whole_rows:
            assert found == [([None], [0])]
        else:
            assert found == [(["word "], []), ([None], [0]), ([], []), ([], []), ([], [])]
        output = assembler.assemble(row_slices[-1], one_chunk(0, 4, 0))
        assert output is not None
        assert output.batch.column("text").to_pylist() == [None, "last"]
        assert (sorted(output.errors), output.offsets.tolist()) == ([0], [0, 1, 2])


def test_the_last_part_counts_what_the_rows_hold() -> None:
    text = "word " * 1000
    row_slices, *_ = row_slices_of([text])
    assert len(row_slices) == 5
    share = row_slices[0].num_bytes / len(row_slices[0].texts.data) * len(row_slices[-1].texts.data)
    assert row_slices[-1].num_bytes - share == pytest.approx(len(text), abs=100)
    whole = sum(row_slice.num_bytes for row_slice in row_slices)
    per_byte = -(-(100 + 8 * 8) // (8 - 2)) + 3
    assert per_byte * len(text) <= whole + len(row_slices) <= per_byte * len(text) + 300


def test_parts_are_smaller_where_a_prompt_takes_of_each_chunk() -> None:
    text = "word " * 4000
    plain, *_ = row_slices_of([text])
    prompted, *_ = row_slices_of([text], taken=4)
    assert sum(row_slice.num_bytes for row_slice in prompted) > 2 * sum(p.num_bytes for p in plain)


def test_a_row_with_more_chunks_than_are_kept_fails() -> None:
    most = 3 * 45  # each part has 8 bytes of vectors, 32 of ranges and 5 of text
    text = "word " * 1000
    row_slices, schema, spec = row_slices_of([text, "last", text[:2000]])
    assembler = ChunkAssembler(schema, spec, "u", whole_rows=True, max_kept_bytes=most)
    found = []
    for number, row_slice in enumerate(row_slices):
        first = 0 if row_slice.texts.num_texts and row_slice.part == 0 else number
        output = assembler.assemble(row_slice, one_chunk(first, first + 5, number))
        assert len(assembler._kept) <= 4
        if output is not None:
            found.append((output.batch.column("text").to_pylist(), output.errors))
    assert found[0][0] == [None]
    error = found[0][1][0]
    assert isinstance(error, RowTooLargeError)
    assert "at most 135" in error.message
    assert all(not errors for _, errors in found[1:])  # and the next are counted from nothing


def test_the_texts_of_chunks_are_those_of_their_rows() -> None:
    row_slices, schema, spec = row_slices_of(["one two", None, "Grüße"])
    (row_slice,) = row_slices
    spans = np.array([[0, 4, 0, 4], [3, 7, 3, 7], [0, 3, 0, 4], [3, 5, 4, 7]], np.int64)
    numbers = np.array([0, 1, 0, 1], np.int32)
    ones = np.ones(4, np.int32)
    chunks = Chunks(np.array([0, 2, 4]), numbers, ones, spans, numbers == 0)
    none = np.zeros(4, np.bool_)
    outcome = EmbeddingBatch(np.ones((4, 2), np.float32), None, numbers, none, {}, chunks)
    output = ChunkAssembler(schema, spec, "u", whole_rows=True).assemble(row_slice, outcome)
    assert output is not None
    assert output.batch.column("text").to_pylist() == ["one ", " two", None, "Grü", "ße"]


def test_what_chunks_have_of_their_row_once_more_each_is_counted() -> None:
    row_slices, schema, spec = row_slices_of(["one two", "three"])
    (row_slice,) = row_slices
    assembler = ChunkAssembler(schema, spec, "u", whole_rows=True)
    assembler.assemble(row_slice, several_chunks([1, 3]))
    assert assembler.kept_bytes == 0  # these have nothing but what each row has
    schema = schema.insert(1, pa.field("metadata", pa.utf8()))
    rows = row_slice.rows.append_column("metadata", pa.array(["a", "b" * 1000]))
    for counts, repeated in (([1, 1], 0), ([1, 3], 2000), ([1, 21], 20_000)):
        assembler = ChunkAssembler(schema, spec, "u", whole_rows=True)
        assert assembler.assemble(replace(row_slice, rows=rows), several_chunks(counts)) is not None
        assert repeated <= assembler.kept_bytes <= repeated + 8 * sum(counts)


def several_chunks(counts: list[int]) -> EmbeddingBatch:
    """Of each text so many."""
    numbers = np.zeros(sum(counts), np.int32)
    places = np.zeros((len(numbers), 4), np.int64)
    chunks = Chunks(np.append(0, np.cumsum(counts)), numbers, numbers, places, numbers == 0)
    vectors = np.ones((len(numbers), 2), np.float32)
    return EmbeddingBatch(vectors, None, numbers, numbers > 0, {}, chunks)


def test_what_rows_carry_is_not_given_to_any_number_of_chunks() -> None:
    schema = pa.schema([("id", pa.utf8()), ("text", pa.utf8())])
    intake = Intake(
        schema,
        EmbedCommand(),
        IntakeLimits(1 << 20, 1 << 20, 4, 1 << 20, 8, 100),
        TextTreatment(chunking=HOW),
        carry_text=False,
        small_is_interactive=False,
    )
    spec = VectorSpec("m@0", 2, "float32", 1, "mean", normalized=False, chunking=HOW)
    output = output_schema(spec, id_type=pa.utf8())
    assembler = ChunkAssembler(output, spec, "u", whole_rows=False, max_kept_bytes=5000)
    numbers = np.zeros(40, np.int32)
    chunks = Chunks(
        np.array([0, 1, 20, 40]), numbers, numbers, np.zeros((40, 4), np.int64), numbers > 0
    )
    outcome = EmbeddingBatch(np.ones((40, 2), np.float32), None, numbers, numbers > 0, {}, chunks)
    for size, failed in ((20, []), (300, [2])):
        ids = ["x" * 4000, "b", "x" * size]
        (row_slice,) = intake.row_slices(
            pa.record_batch([ids, ["one", "two", "three"]], schema), 0, 0
        )
        output = assembler.assemble(row_slice, outcome)
        assert output is not None
        assert list(output.errors) == failed
        assert all(error.code == "row_too_large" for error in output.errors.values())
        assert output.batch.num_rows == (21 if failed else 40)
        assert output.batch.column("vector").null_count == len(failed)
