"""Columns in other types than a dataset's, and in encodings that LanceDB does not store."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from fletcher.errors import BatchTooLargeError, ColumnTypeError
from fletcher.storeserver.stored_columns import as_stored, decode_columns

TEXTS = pa.array(["a", None, "ü", "a"])
LIMIT = 1 << 20


def runs(values: pa.Array) -> pa.Array:
    return pc.run_end_encode(values)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (TEXTS, pa.utf8()),
        (TEXTS.cast(pa.large_utf8()), pa.large_utf8()),
        (TEXTS.cast(pa.string_view()), pa.utf8()),
        (TEXTS.dictionary_encode(), pa.utf8()),
        (TEXTS.cast(pa.large_utf8()).dictionary_encode(), pa.large_utf8()),
        (
            pa.DictionaryArray.from_arrays(
                pa.array([0, None, 1, 0], pa.int8()), pa.array(["a", "ü"], pa.string_view())
            ),
            pa.utf8(),
        ),
        (runs(TEXTS), pa.utf8()),
        (pa.array([3, None, 4, 3]).dictionary_encode(), pa.int64()),
        (pa.array([b"\xff", None, b"", b"x"], pa.binary_view()), pa.binary()),
    ],
)
@pytest.mark.parametrize("part", [slice(0, 4), slice(1, 3)])
def test_encodings_become_plain_columns(column: pa.Array, kind: pa.DataType, part: slice) -> None:
    batch = pa.record_batch({"x": column, "n": pa.array(range(4))})
    batch = batch.slice(part.start, part.stop - part.start).replace_schema_metadata({"k": "v"})
    plain = decode_columns(batch, LIMIT)
    assert plain.schema.types == [kind, pa.int64()]
    assert plain.to_pydict() == batch.to_pydict()
    assert plain.schema.metadata == {b"k": b"v"}
    plain.validate(full=True)


def test_a_plain_batch_is_not_copied() -> None:
    batch = pa.record_batch({"x": TEXTS})
    assert decode_columns(batch, 0) is batch
    assert as_stored(batch, batch.schema) is batch


@pytest.mark.parametrize(
    "column",
    [
        pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["x" * 1000]),
        pa.array(["x" * 1000] * 2000, pa.string_view()),
        runs(pa.array(["x" * 1000] * 2000)),
    ],
)
def test_a_few_bytes_do_not_become_many(column: pa.Array) -> None:
    with pytest.raises(BatchTooLargeError, match="`x` stands for 1 MiB of values") as caught:
        decode_columns(pa.record_batch({"x": column}), LIMIT)
    assert caught.value.field == "x"


@pytest.mark.parametrize(
    "keys",
    [TEXTS.cast(pa.large_utf8()), TEXTS.cast(pa.string_view()), TEXTS.dictionary_encode(), TEXTS],
)
def test_batch_keys_become_utf8(keys: pa.Array) -> None:
    plain = decode_columns(pa.record_batch({"batch_key": keys}), LIMIT)
    assert plain.column(0) == TEXTS


def test_batch_keys_that_are_no_texts_are_refused() -> None:
    with pytest.raises(ColumnTypeError, match="`batch_key` is int64, expected utf8"):
        decode_columns(pa.record_batch({"batch_key": [1]}), LIMIT)


@pytest.mark.parametrize("sent", [pa.utf8(), pa.large_utf8()])
@pytest.mark.parametrize("stored", [pa.utf8(), pa.large_utf8()])
def test_texts_take_the_types_of_the_dataset(sent: pa.DataType, stored: pa.DataType) -> None:
    batch = pa.record_batch({"x": TEXTS.cast(sent), "new": TEXTS.cast(sent)})
    found = as_stored(batch, pa.schema([("x", stored), ("y", pa.int8())]))
    assert found.schema.types == [stored, sent]
    assert found.to_pydict() == batch.to_pydict()


def test_other_types_are_left_to_be_refused() -> None:
    batch = pa.record_batch({"x": pa.array([b"a"]), "n": pa.array([1]), "t": pa.array(["a"])})
    stored = pa.schema([("x", pa.large_binary()), ("n", pa.int32()), ("t", pa.binary())])
    found = as_stored(batch, stored)
    assert found.schema.types == [pa.large_binary(), pa.int64(), pa.utf8()]
