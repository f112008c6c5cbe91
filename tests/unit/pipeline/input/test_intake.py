"""What is let in, refused, and how it is cut: every string type, nulls, slices, nonsense."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fletcher.core.batches import EmbeddingBatch
from fletcher.core.command import EmbedCommand
from fletcher.core.schema import VectorSpec, output_schema
from fletcher.core.stored_vectors import StoredVectors
from fletcher.errors import (
    BatchTooLargeError,
    ColumnTypeError,
    FletcherError,
    InvalidCommandError,
    InvalidUtf8Error,
    RowTooLargeError,
    UnknownColumnError,
)
from fletcher.pipeline.assembly import Assembler
from fletcher.pipeline.input.intake import Intake, TextTreatment
from fletcher.pipeline.input.limits import COLUMN_BYTES, IntakeLimits
from fletcher.pipeline.input.row_slice import RowSlice

LIMITS = IntakeLimits(
    max_message_bytes=1 << 20,
    max_row_bytes=1000,
    slice_rows=4,
    slice_bytes=2000,
    table_values=8,
    bytes_per_row=100,
)
SPEC = VectorSpec("m@0", 2, "float32", 1, "mean", normalized=False)
TEXTS = ["zero", "one", "", "drei", "vier", "fünf", "六", "one", "acht", "neun"]


def make(schema: pa.Schema, limits: IntakeLimits = LIMITS, **options: Any) -> Intake:
    return Intake(
        schema,
        EmbedCommand(**options),
        limits,
        TextTreatment(),
        carry_text=True,
        small_is_interactive=False,
    )


def views_of(value: str | bytes, num_rows: int) -> pa.Array:
    """Many views of the same bytes."""
    kind = pa.string_view() if isinstance(value, str) else pa.binary_view()
    one = pa.array([value], kind).buffers()
    views = pa.py_buffer(np.tile(np.frombuffer(one[1], np.uint8), num_rows))
    return pa.Array.from_buffers(kind, num_rows, [None, views, one[2]])


def encode(text: str) -> list[float]:
    """A vector that tells texts apart."""
    data = text.encode()
    return [float(len(data)), float(sum(data))]


def texts_of(row_slice: RowSlice) -> list[str]:
    offsets, data = row_slice.texts.offsets, bytes(row_slice.texts.data)
    return [data[a:b].decode() for a, b in pairwise(offsets)]


def assembled(
    assembler: Assembler, row_slice: RowSlice, outcome: EmbeddingBatch | FletcherError
) -> tuple[pa.RecordBatch, dict[int, FletcherError]]:
    output = assembler.assemble(row_slice, outcome)
    assert output is not None
    return output.batch, output.errors


def embed(intake: Intake, *batches: pa.RecordBatch) -> tuple[pa.Table, dict[int, str], list[str]]:
    """Runs batches through intake and assembly; output, errors by row, and texts embedded."""
    schema = output_schema(
        SPEC, id_type=intake.id_type, carried=intake.carried_fields, text=intake.carry_text
    )
    assembler = Assembler(schema, SPEC, "u")
    parts, errors, embedded, row = [], {}, [], 0
    for number, batch in enumerate(batches):
        for row_slice in intake.row_slices(batch, number, row):
            texts = texts_of(row_slice)
            embedded += texts
            outcome = EmbeddingBatch(
                embeddings=np.array([encode(text) for text in texts], np.float32).reshape(-1, 2),
                norms=None,
                token_count=np.array([len(text) for text in texts], np.int32),
                truncated=np.zeros(len(texts), np.bool_),
            )
            part, bad = assembled(assembler, row_slice, outcome)
            parts.append(part)
            errors |= {row_slice.row_first + one: error.code for one, error in bad.items()}
        row += batch.num_rows
    return pa.Table.from_batches(parts, schema), errors, embedded


def check(table: pa.Table, texts: list[str | None]) -> None:
    expected = [None if text is None else encode(text) for text in texts]
    assert table.column("vector").to_pylist() == expected
    assert table.column("text").to_pylist() == texts
    assert table.column("id").to_pylist() == [f"u:{row}" for row in range(len(texts))]
    table.validate(full=True)


@pytest.mark.parametrize("kind", [pa.utf8(), pa.large_utf8(), pa.string_view()])
def test_every_string_type_and_slices(kind: pa.DataType) -> None:
    array = pa.array(["before", *TEXTS, "after"], kind)
    batch = pa.record_batch({"text": array}).slice(1, len(TEXTS))
    table, errors, _ = embed(make(batch.schema), batch)
    check(table, TEXTS)
    assert not errors


@pytest.mark.parametrize("kind", [pa.utf8(), pa.large_utf8(), pa.string_view()])
@pytest.mark.parametrize("text", ["alone", "", None])
def test_a_batch_of_a_single_row(text: str | None, kind: pa.DataType) -> None:
    array = pa.array(["before", text, "after"], kind)
    batch = pa.record_batch({"text": array}).slice(1, 1)
    table, errors, embedded = embed(make(batch.schema), batch)
    check(table, [text])
    assert sorted(errors) == ([0] if text is None else [])
    assert embedded == ([] if text is None else [text])


@pytest.mark.parametrize("num_rows", [1, 3])
def test_buffers_count_in_full_however_little_of_them_is_used(num_rows: int) -> None:
    data, end = b"x" * 500_000, np.full(num_rows + 1, 500_000, np.int32)
    end[0] -= 5
    buffers = [None, pa.py_buffer(end), pa.py_buffer(data)]
    batch = pa.record_batch({"text": pa.Array.from_buffers(pa.utf8(), num_rows, buffers)})
    (row_slice,) = make(batch.schema).row_slices(batch, 0, 0)
    assert texts_of(row_slice)[0] == "xxxxx"
    assert row_slice.num_bytes > 500_000


@pytest.mark.parametrize("kind", [pa.utf8(), pa.large_utf8()])
@pytest.mark.parametrize("text", ["alone", "", "fünf", "x" * 1000, "x" * 1001, None])
def test_the_short_way_of_a_single_row_makes_the_same_piece(
    text: str | None, kind: pa.DataType
) -> None:
    batch = pa.record_batch({"text": pa.array(["before", text, "after"], kind)}).slice(1, 1)
    intake = make(batch.schema, truncate="start")
    (short,) = intake.row_slices(batch, 7, 70)
    (long,) = intake.row_slices(
        batch, 7, 70, skip=lambda rows, _: (np.zeros(rows.num_rows, np.bool_), None)
    )
    assert texts_of(short) == texts_of(long)
    assert short.values.tolist() == long.values.tolist()
    assert short.rows.equals(long.rows)
    assert short.texts.truncate == long.texts.truncate == "start"
    for name in ("batch_id", "row_first", "last", "num_bytes", "priority", "new_table"):
        assert getattr(short, name) == getattr(long, name), name
    assert {row: one.code for row, one in short.errors.items()} == {
        row: one.code for row, one in long.errors.items()
    }


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("text", ["alone", None])
def test_the_short_way_of_a_single_row_makes_the_same_output(
    text: str | None, truncated: bool
) -> None:
    batch = pa.record_batch({"text": pa.array([text], pa.utf8())})
    (row_slice,) = make(batch.schema).row_slices(batch, 0, 41)
    outcome = EmbeddingBatch(
        embeddings=np.array([[0.25, -1.5]] * row_slice.texts.num_texts, np.float32).reshape(-1, 2),
        norms=None,
        token_count=np.full(row_slice.texts.num_texts, 7, np.int32),
        truncated=np.full(row_slice.texts.num_texts, truncated),
    )
    # A column more is not plain.
    schemas = [output_schema(SPEC, id_type=pa.utf8(), text=more) for more in (False, True)]
    (short, errors), (long, _) = (
        assembled(Assembler(schema, SPEC, "u"), row_slice, outcome) for schema in schemas
    )
    short.validate(full=True)
    assert short.equals(long.drop_columns("text"))
    assert sorted(errors) == ([0] if text is None else [])
    assert short.column("vector").to_pylist() == [None if text is None else [0.25, -1.5]]


def test_a_single_row_keeps_the_id_that_came_with_it() -> None:
    batch = pa.record_batch({"text": ["alone"], "id": ["mine"]})
    (row_slice,) = make(batch.schema).row_slices(batch, 0, 0)
    outcome = EmbeddingBatch(
        np.ones((1, 2), np.float32), None, np.ones(1, np.int32), np.zeros(1, np.bool_)
    )
    assembler = Assembler(output_schema(SPEC, id_type=pa.utf8()), SPEC, "u")
    assert assembled(assembler, row_slice, outcome)[0].column("id").to_pylist() == ["mine"]


def test_a_single_text_that_failed_is_a_null_beside_its_error() -> None:
    batch = pa.record_batch({"text": ["alone"]})
    (row_slice,) = make(batch.schema).row_slices(batch, 0, 0)
    failure = RowTooLargeError("too long", field="truncate")
    empty = EmbeddingBatch(
        np.zeros((1, 2), np.float32),
        None,
        np.zeros(1, np.int32),
        np.zeros(1, np.bool_),
        {0: failure},
    )
    assembler = Assembler(output_schema(SPEC, id_type=pa.utf8()), SPEC, "u")
    for outcome in (failure, empty):
        output, errors = assembled(assembler, row_slice, outcome)
        assert output.column("vector").to_pylist() == [None]
        assert errors == {0: failure}


def test_a_repeated_text_is_embedded_once_a_piece() -> None:
    texts = ["b", "a", "b", "b", "a", "c", "a", "a"]
    batch = pa.record_batch({"text": texts})
    table, errors, embedded = embed(make(batch.schema), batch)
    check(table, texts)
    assert embedded == ["b", "a", "a", "c"]
    assert not errors


def test_a_repeated_text_that_fails_fails_every_row_of_it() -> None:
    batch = pa.record_batch({"text": ["good", "bad", "good", "bad"]})
    (row_slice,) = make(batch.schema).row_slices(batch, 0, 0)
    assembler = Assembler(output_schema(SPEC, id_type=pa.utf8(), text=True), SPEC, "u")
    outcome = EmbeddingBatch(
        embeddings=np.array([[1, 2], [0, 0]], np.float32),
        norms=None,
        token_count=np.array([1, 0], np.int32),
        truncated=np.zeros(2, np.bool_),
        errors={1: RowTooLargeError("too long")},
    )
    output, errors = assembled(assembler, row_slice, outcome)
    assert sorted(errors) == [1, 3]
    assert output.column("vector").to_pylist() == [[1, 2], None, [1, 2], None]


@pytest.mark.parametrize("encoded", [False, True])
def test_rows_that_are_not_wanted_are_not_embedded_and_have_no_error(encoded: bool) -> None:
    texts = pa.array(["a", None, "b", "c", "a", "bad"])
    batch = pa.record_batch({"text": texts.dictionary_encode() if encoded else texts})
    seen: list[tuple[int, int]] = []

    def skip(rows: pa.RecordBatch, row_first: int) -> Any:
        seen.append((row_first, rows.num_rows))
        return np.isin(np.arange(row_first, row_first + rows.num_rows), [10, 11, 13, 14]), None

    row_slices = list(make(batch.schema).row_slices(batch, 0, 10, skip=skip))
    assert seen == [(10, 4), (14, 2)]
    assert [texts_of(row_slice) for row_slice in row_slices] == [["b"], ["bad"]]
    # A row that fails says so, wanted or not.
    assert [row_slice.skipped.tolist() for row_slice in row_slices] == [[0, 3], [0]]
    assembler = Assembler(output_schema(SPEC, id_type=pa.utf8(), text=True), SPEC, "u")
    _, errors = assembled(assembler, row_slices[0], RowTooLargeError("too long"))
    assert sorted(errors) == [1, 2]
    output, errors = assembled(assembler, row_slices[1], RowTooLargeError("too long"))
    assert (sorted(errors), output.column("vector").null_count) == ([1], 2)


@pytest.mark.parametrize("kind", [pa.utf8(), pa.large_utf8(), pa.string_view()])
@pytest.mark.parametrize("codes", [pa.int8(), pa.uint32(), pa.int64()])
def test_a_dictionary_is_embedded_once_over_batches(kind: pa.DataType, codes: pa.DataType) -> None:
    values = pa.array(["a", "bb", "ccc", "never used"], kind)
    rows = [0, 1, 0, None, 2, 2, 1, 0, 0]
    array = pa.DictionaryArray.from_arrays(pa.array(rows, codes), values)
    batch = pa.record_batch({"text": array})
    intake = make(batch.schema)
    table, errors, embedded = embed(intake, batch, batch.slice(2))
    decoded = array.to_pylist()
    check(table, decoded + decoded[2:])
    assert embedded == ["a", "bb", "ccc"]
    assert errors == {3: "invalid_command", 10: "invalid_command"}


def test_a_new_dictionary_starts_a_new_table() -> None:
    def batch(values: list[str]) -> pa.RecordBatch:
        array = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1]), pa.array(values))
        return pa.record_batch({"text": array})

    first, second = batch(["a", "bb"]), batch(["ccc", "dddd"])
    table, _, embedded = embed(make(first.schema), first, second, second)
    check(table, ["a", "bb", "bb", *(2 * ["ccc", "dddd", "dddd"])])
    assert embedded == ["a", "bb", "ccc", "dddd"]


def test_a_large_dictionary_is_looked_up_piece_by_piece() -> None:
    values = [f"value {n}" for n in range(20)]
    codes = [3, 3, 3, 3, 19, 3, None, 0]
    array = pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(values))
    batch = pa.record_batch({"text": array})
    table, _, embedded = embed(make(batch.schema), batch)
    check(table, array.to_pylist())
    assert embedded == ["value 3", "value 0", "value 3", "value 19"]


def test_a_dictionary_without_room_for_its_table_is_looked_up_piece_by_piece() -> None:
    words = pa.array(["a", "b", "c"])
    batch = pa.record_batch([pa.DictionaryArray.from_arrays([0, 1, 2, 0, 1, 2], words)], ["text"])
    intake = make(batch.schema)
    room = iter([False, True])
    asked: list[int] = []

    def keep(num_bytes: int) -> bool:
        asked.append(num_bytes)
        return next(room)

    row_slices = [
        row_slice for _ in range(3) for row_slice in intake.row_slices(batch, 0, 0, keep=keep)
    ]
    assert [texts_of(row_slice) for row_slice in row_slices] == [
        *(["a", "b", "c"], ["b", "c"]),  # no room
        *(["a", "b", "c"], []),
        *([], []),
    ]
    assert [row_slice.new_table for row_slice in row_slices] == [None, None, 3, None, None, None]
    assert len(asked) == 2


def test_a_dictionary_with_null_values() -> None:
    array = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["a", None]))
    batch = pa.record_batch({"text": array})
    table, errors, _ = embed(make(batch.schema), batch)
    check(table, ["a", None, "a"])
    assert errors == {1: "invalid_command"}


def test_an_empty_dictionary_of_null_rows() -> None:
    # Code -1, which null rows take, was looked up in a dictionary without values.
    array = pa.DictionaryArray.from_arrays(pa.array([None, None], pa.int8()), pa.array([], "utf8"))
    table, errors, _ = embed(
        make(pa.schema({"text": array.type})), pa.record_batch([array], ["text"])
    )
    check(table, [None, None])
    assert errors == {0: "invalid_command", 1: "invalid_command"}


def test_a_piece_is_charged_for_all_that_its_batch_holds() -> None:
    # Carried and unused columns stay in memory with the message, and were not counted.
    batch = pa.record_batch({"text": ["a"] * 8, "big": ["x" * 50_000] * 8})
    for columns in ((), ("big",)):
        row_slices = make(batch.schema, columns=columns).row_slices(batch, 0, 0)
        assert sum(row_slice.num_bytes for row_slice in row_slices) > 8 * 50_000


def test_few_bytes_that_stand_for_many_are_refused_before_they_are_written_out() -> None:
    long = "x" * 5000
    codes = pa.array(np.zeros(300, np.int8))
    carried = pa.DictionaryArray.from_arrays(codes, pa.array([long]))
    texts = views_of(long, 300)
    # One long value among short ones: their mean says little of what all codes stand for.
    skewed = [
        pa.DictionaryArray.from_arrays(codes, pa.array([long.encode()] + [b""] * 100)),
        pa.DictionaryArray.from_arrays(codes, pa.array([[1] * 5000] + [[]] * 100)),
    ]
    bombs = [
        pa.record_batch({"text": ["a"] * 300, "big": carried}),
        *(pa.record_batch({"text": ["a"] * 300, "big": one}) for one in skewed),
        pa.record_batch({"text": ["a"] * 300, "big": views_of(b"x" * 5000, 300)}),
        pa.record_batch({"text": texts, "big": ["a"] * 300}),
        pa.record_batch({"text": pa.nulls(70_000, pa.utf8()), "big": pa.nulls(70_000, pa.int8())}),
    ]
    for batch in bombs:
        with pytest.raises(BatchTooLargeError, match="smaller batches"):
            next(make(batch.schema, columns=("big",)).row_slices(batch, 0, 0))
        if batch.num_rows == 300:
            small = batch.slice(0, 20)
            assert next(make(batch.schema, columns=("big",)).row_slices(small, 0, 0)).num_rows


def test_a_row_keeps_its_own_error_beside_a_text_that_fails() -> None:
    # A row without a vector points to the first place of the table, and took the error from there.
    batch = pa.record_batch({"text": ["too long", None]})
    intake = make(batch.schema)
    (row_slice,) = intake.row_slices(batch, 0, 0)
    assembler = Assembler(output_schema(SPEC, id_type=pa.utf8(), text=True), SPEC, "u")
    _, errors = assembled(assembler, row_slice, RowTooLargeError("too long"))
    assert {row: error.code for row, error in errors.items()} == {
        0: "row_too_large",
        1: "invalid_command",
    }


def test_rows_that_cannot_be_embedded_fail_alone() -> None:
    texts = ["good", None, "x" * 1001, "good too", "no id", "last"]
    batch = pa.record_batch({"text": texts, "id": pa.array([1, 2, 3, 4, None, 6], pa.uint16())})
    table, errors, embedded = embed(make(batch.schema), batch)
    assert errors == {1: "invalid_command", 2: "row_too_large", 4: "invalid_command"}
    assert embedded == ["good", "good too", "last"]
    vectors = table.column("vector").to_pylist()
    assert [vector is None for vector in vectors] == [False, True, True, False, True, False]
    assert table.column("id").to_pylist() == [1, 2, 3, 4, None, 6]
    assert table.schema.field("id").type == pa.uint16()


def test_a_piece_of_only_bad_rows() -> None:
    batch = pa.record_batch({"text": pa.array([None] * 5, pa.utf8())})
    table, errors, embedded = embed(make(batch.schema), batch)
    assert table.column("vector").to_pylist() == [None] * 5
    assert (sorted(errors), embedded) == ([0, 1, 2, 3, 4], [])


def test_pieces_keep_their_bounds_and_the_last_is_marked() -> None:
    batch = pa.record_batch({"text": ["x" * 900] * 5 + ["y"] * 9})
    row_slices = list(make(batch.schema).row_slices(batch, 7, 100))
    assert [row_slice.num_rows for row_slice in row_slices] == [2, 2, 4, 4, 2]
    assert [row_slice.row_first for row_slice in row_slices] == [100, 102, 104, 108, 112]
    assert [row_slice.last for row_slice in row_slices] == [False] * 4 + [True]
    assert {row_slice.batch_id for row_slice in row_slices} == {7}


def test_an_empty_batch_is_one_empty_piece() -> None:
    schema = pa.schema({"text": pa.dictionary(pa.int32(), pa.utf8()), "id": pa.int32()})
    for kind in (schema, pa.schema({"text": pa.utf8()})):
        batch = pa.RecordBatch.from_pylist([], kind)
        (row_slice,) = make(kind).row_slices(batch, 0, 0)
        assert (row_slice.num_rows, row_slice.last, row_slice.texts.num_texts) == (0, True, 0)


def test_carried_columns_and_metadata() -> None:
    batch = pa.record_batch(
        {
            "body": ["a", "b"],
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "weight": [1.5, None],
            "unused": [1, 2],
        }
    )
    intake = make(batch.schema, text_column="body", columns=("kind", "weight"))
    table, _, _ = embed(intake, batch)
    assert table.schema.names[-2:] == ["kind", "weight"]
    assert table.schema.field("kind").type == pa.utf8()
    assert table.column("kind").to_pylist() == ["x", "y"]
    assert table.column("weight").to_pylist() == [1.5, None]
    assert "unused" not in table.schema.names


def test_carried_columns_keep_the_metadata_of_their_field() -> None:
    weight = pa.field("weight", pa.float64(), metadata={"unit": "kg", "ARROW:extension:name": "x"})
    schema = pa.schema([pa.field("text", pa.utf8()), weight])
    intake = make(schema, columns=("weight",))
    table, _, _ = embed(intake, pa.record_batch([["a"], [1.5]], schema))
    assert table.schema.field("weight").metadata == {b"unit": b"kg"}


@pytest.mark.parametrize("encoded", [False, True])
def test_carried_views_leave_as_plain_columns(encoded: bool) -> None:
    # Stores have no views: a dataset was made with plain columns, and then refused these rows.
    long = ["x" * 20, None, "y" * 30, "z"]
    columns = {
        "words": pa.array(long, pa.string_view()),
        "raw": pa.array([one and one.encode() for one in long], pa.binary_view()),
    }
    if encoded:
        codes = pa.array([0, 1, 2, 3], pa.int8())
        columns = {
            name: pa.DictionaryArray.from_arrays(codes, one) for name, one in columns.items()
        }
    batch = pa.record_batch({"text": ["a", "b", "c", "d"], **columns})
    intake = make(batch.schema, columns=("words", "raw"))
    table, _, _ = embed(intake, batch.slice(0, 2), batch.slice(2))
    assert [field.type for field in table.schema][-2:] == [pa.utf8(), pa.binary()]
    assert table.column("words").to_pylist() == long
    assert table.column("raw").to_pylist() == [one and one.encode() for one in long]


@pytest.mark.parametrize(
    ("schema", "options", "error", "field"),
    [
        ({"body": pa.utf8()}, {}, UnknownColumnError, "text_column"),
        ({"text": pa.int64()}, {}, ColumnTypeError, "text_column"),
        ({"text": pa.binary()}, {}, ColumnTypeError, "text_column"),
        ({"text": pa.dictionary(pa.int8(), pa.int64())}, {}, ColumnTypeError, "text_column"),
        ({"text": pa.utf8(), "id": pa.float64()}, {}, ColumnTypeError, "id_column"),
        ({"text": pa.utf8()}, {"id_column": "key"}, UnknownColumnError, "id_column"),
        ({"text": pa.utf8()}, {"columns": ("nope",)}, UnknownColumnError, "columns"),
    ],
)
def test_a_schema_that_does_not_fit(
    schema: dict[str, pa.DataType], options: dict[str, Any], error: type[Exception], field: str
) -> None:
    with pytest.raises(error) as caught:
        make(pa.schema(schema), **options)
    assert caught.value.field == field  # type: ignore[attr-defined]


def test_a_column_name_that_comes_twice() -> None:
    schema = pa.schema([("text", pa.utf8()), ("text", pa.utf8())])
    with pytest.raises(InvalidCommandError, match="2 input columns"):
        make(schema)


def test_a_carried_column_cannot_take_an_output_columns_name() -> None:
    with pytest.raises(InvalidCommandError, match="`vector`"):
        output_schema(SPEC, id_type=pa.utf8(), carried=[pa.field("vector", pa.utf8())])


def test_invalid_utf8_and_bad_offsets_are_refused_before_use() -> None:
    bad = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"a\xff\xfe")
    )
    batch = pa.record_batch({"text": bad})
    with pytest.raises(InvalidUtf8Error, match="`text`"):
        list(make(batch.schema).row_slices(batch, 0, 0))
    for offsets in ([0, 1 << 30, 3], [0, -5, 3], [2, 1, 3]):
        wild = pa.StringArray.from_buffers(
            2, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(b"abc")
        )
        batch = pa.record_batch({"text": wild})
        with pytest.raises((ColumnTypeError, InvalidUtf8Error)):
            list(make(batch.schema).row_slices(batch, 0, 0))


@pytest.mark.parametrize("offsets", [[0, 1 << 30], [0, -5], [2, 1], [-1, 2], [1, 3]])
def test_a_single_row_is_checked_in_full(offsets: list[int]) -> None:
    data = pa.py_buffer(b"a\xff\xfe")
    # Between good ones: pyarrow looks at the first and the last when it makes an array.
    buffer = pa.py_buffer(np.array([0, *offsets, 3], np.int32))
    wild = pa.StringArray.from_buffers(3, buffer, data)
    batch = pa.record_batch({"text": wild}).slice(1, 1)
    with pytest.raises((ColumnTypeError, InvalidUtf8Error)):
        list(make(batch.schema).row_slices(batch, 0, 0))


def test_a_single_row_over_the_limit_is_refused() -> None:
    batch = pa.record_batch({"text": ["x" * (1 << 20)]})
    with pytest.raises(BatchTooLargeError, match="smaller batches"):
        list(make(batch.schema).row_slices(batch, 0, 0))


@pytest.mark.parametrize("columns", [(), ("big",)])
def test_views_that_point_nowhere_are_refused(columns: tuple[str, ...]) -> None:
    # Arrow says IndexError of these alone, which was an internal error.
    good = views_of("x" * 50, 2)
    wild = pa.Array.from_buffers(good.type, 2, [*good.buffers()[:2], pa.py_buffer(b"short")])
    batch = pa.record_batch({"text": ["a", "b"] if columns else wild, "big": wild})
    with pytest.raises(ColumnTypeError, match="View at slot 0"):
        next(make(batch.schema, columns=columns).row_slices(batch, 0, 0))


def test_dictionary_codes_out_of_range_are_refused() -> None:
    codes = pa.array([0, 99], pa.int32())
    wild = pa.DictionaryArray.from_arrays(codes, pa.array(["a"]), safe=False)
    batch = pa.record_batch({"text": wild})
    with pytest.raises(ColumnTypeError):
        list(make(batch.schema).row_slices(batch, 0, 0))


def test_a_batch_over_the_limit_is_refused() -> None:
    batch = pa.record_batch({"text": ["x" * 600] * 2000})
    with pytest.raises(BatchTooLargeError, match="smaller batches"):
        list(make(batch.schema).row_slices(batch, 0, 0))


def test_small_batches_are_interactive_where_asked() -> None:
    def priority(num_rows: int, **options: Any) -> str:
        batch = pa.record_batch({"text": ["hi"] * num_rows})
        command = EmbedCommand(**options)
        intake = Intake(
            batch.schema,
            command,
            LIMITS,
            TextTreatment(),
            carry_text=False,
            small_is_interactive=True,
        )
        return next(intake.row_slices(batch, 0, 0)).priority

    assert priority(1) == "interactive"
    assert priority(33) == "bulk"
    assert priority(1, priority="bulk") == "bulk"
    assert priority(33, priority="interactive") == "interactive"


@pytest.mark.parametrize(("priority", "sizes"), [("bulk", [6, 4]), ("interactive", [4, 4, 2])])
def test_more_rows_fit_a_slice_of_bulk_work_whose_vectors_are_float16(
    priority: str, sizes: list[int]
) -> None:
    limits = dataclasses.replace(LIMITS, bytes_per_row=2 * 512 + COLUMN_BYTES)
    intake = Intake(
        pa.schema({"text": pa.utf8()}),
        EmbedCommand(priority=priority),
        limits,
        TextTreatment(half=True),
        carry_text=True,
        small_is_interactive=False,
    )
    batch = pa.record_batch({"text": TEXTS})
    row_slices = list(intake.row_slices(batch, 0, 0))
    assert [row_slice.num_rows for row_slice in row_slices] == sizes
    assert all(row_slice.texts.half == (priority == "bulk") for row_slice in row_slices)
    # The vectors of a slice take no more than those of a slice in float32.
    most = limits.slice_rows * limits.bytes_per_row
    assert all(
        row_slice.num_bytes - 6 * len(row_slice.texts.data) <= most for row_slice in row_slices
    )


@pytest.mark.parametrize("encoded", [False, True])
def test_rows_whose_vectors_are_stored_are_not_embedded(encoded: bool) -> None:
    texts = pa.array(["a", None, "b", "a", "bad"])
    batch = pa.record_batch({"text": texts.dictionary_encode() if encoded else texts})
    # The second row fails by itself, and stays without a vector whatever the store has.
    known = pa.record_batch(
        {
            "vector": pa.array([[7, 8], [9, 9], [5, 6]], SPEC.arrow_type),
            "token_count": pa.array([3, 9, 4], pa.int32()),
            "truncated": [False, False, False],
        }
    )

    def skip(rows: pa.RecordBatch, row_first: int) -> Any:
        if row_first:
            return np.zeros(rows.num_rows, np.bool_), None
        return np.zeros(rows.num_rows, np.bool_), StoredVectors(np.array([0, 1, 3]), known)

    first, last = make(batch.schema).row_slices(batch, 0, 0, skip=skip)
    assert (texts_of(first), texts_of(last)) == (["b"], ["bad"])
    assembler = Assembler(output_schema(SPEC, id_type=pa.utf8(), text=True), SPEC, "u")
    outcome = EmbeddingBatch(
        np.array([[1, 2]], np.float32), None, np.ones(1, np.int32), np.zeros(1, np.bool_)
    )
    output, errors = assembled(assembler, first, outcome)
    assert sorted(errors) == [1]
    assert output.column("vector").to_pylist() == [[7, 8], None, [1, 2], [5, 6]]
    assert output.column("token_count").to_pylist() == [3, 0, 1, 4]
    assert output.column("text").to_pylist() == ["a", None, "b", "a"]
    # A run that fails concerns only the rows that need it.
    (first, _) = make(batch.schema).row_slices(batch, 0, 0, skip=skip)
    output, errors = assembled(assembler, first, RowTooLargeError("too long"))
    assert sorted(errors) == [1, 2]
    assert output.column("vector").to_pylist() == [[7, 8], None, None, [5, 6]]
