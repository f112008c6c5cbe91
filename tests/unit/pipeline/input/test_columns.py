"""Every Arrow type of texts as ids and metadata, and what else a metadata column may be."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pyarrow as pa
import pytest

from fletcher.core.command import EmbedCommand
from fletcher.errors import ColumnTypeError, InvalidCommandError, UnknownColumnError
from fletcher.pipeline.input.columns import InputColumns

IDS = ["a", "b", "a"]
MEGABYTE = 1 << 20


def encoded(values: list[str | None], kind: str) -> pa.Array:
    """Texts in one of Arrow's forms."""
    if kind == "dictionary of views":
        codes = pa.array(values).dictionary_encode()
        return pa.DictionaryArray.from_arrays(
            codes.indices, codes.dictionary.cast(pa.string_view())
        )
    if kind == "dictionary":
        return pa.array(values).dictionary_encode()
    if kind == "runs":
        ends = pa.array(range(1, len(values) + 1), pa.int32())
        return pa.RunEndEncodedArray.from_arrays(ends, pa.array(values))
    return pa.array(
        values, {"utf8": pa.utf8(), "large": pa.large_utf8(), "view": pa.string_view()}[kind]
    )


FORMS = ["utf8", "large", "view", "dictionary", "dictionary of views", "runs"]


def checked(batch: pa.RecordBatch, **options: Any) -> pa.RecordBatch:
    columns = InputColumns(batch.schema, EmbedCommand(**options), MEGABYTE)
    return columns.checked(batch)


@pytest.mark.parametrize("form", FORMS)
def test_texts_ids_and_metadata_in_every_form(form: str) -> None:
    metadata = ['{"k": 1}', None, "{}"]
    batch = pa.record_batch(
        {
            "text": encoded(IDS, form),
            "id": encoded(IDS, form),
            "metadata": encoded(metadata, form),
            "more": encoded(IDS, form),
        }
    )
    columns = InputColumns(batch.schema, EmbedCommand(columns=("more",)), MEGABYTE)
    assert columns.id_type == pa.utf8()
    assert columns.has_metadata
    for part in (batch, batch.slice(1)):
        used = columns.checked(part)
        assert used.column("text").to_pylist() == part.column("text").to_pylist()
        for name in ("id", "metadata"):
            assert used.column(name) == pa.array(part.column(name).to_pylist(), pa.utf8())
        assert used.column("carried:more").to_pylist() == part.column("more").to_pylist()


def test_uuids_become_texts_as_ids_and_carried() -> None:
    values = [uuid.UUID(int=1), None, uuid.UUID(int=2**127)]
    storage = pa.array([one and one.bytes for one in values], pa.binary(16))
    column = pa.ExtensionArray.from_storage(pa.uuid(), storage)
    batch = pa.record_batch({"text": IDS, "id": column, "more": column})
    used = checked(batch, columns=("more",))
    texts = [one and str(one) for one in values]
    assert used.column("id").to_pylist() == used.column("carried:more").to_pylist() == texts


@pytest.mark.parametrize(
    "column",
    [
        pa.array([{"a": 1, "b": ["ü", None]}, None, {"a": None, "b": []}]),
        pa.array([{"a": 1.5}, {"a": 2.0}, None]),
        pa.array([[("k", 1)], None, []], pa.map_(pa.utf8(), pa.int64())),
        pa.array([[True], None, []], pa.large_list(pa.bool_())),
        pa.array([1, None, 2**60]),
        pa.nulls(3),
    ],
)
def test_other_metadata_becomes_json(column: pa.Array) -> None:
    used = checked(pa.record_batch({"text": IDS, "metadata": column}))
    texts = used.column("metadata").to_pylist()
    assert used.column("metadata").type == pa.utf8()
    found = [None if one is None else json.loads(one) for one in texts]
    assert found == column.to_pylist(maps_as_pydicts="strict")


def test_what_json_cannot_hold_is_refused() -> None:
    time = pa.array([{"at": 1}] * 3, pa.struct([("at", pa.timestamp("s"))]))
    for column in (
        time,
        pa.array([b"a"] * 3),
        pa.array([[(1, 1)]] * 3, pa.map_(pa.int8(), pa.int8())),
    ):
        batch = pa.record_batch({"text": IDS, "metadata": column})
        with pytest.raises(ColumnTypeError, match="`metadata` is"):
            checked(batch)
    batch = pa.record_batch({"text": IDS, "metadata": [{"a": 1.0}, {"a": float("nan")}, None]})
    with pytest.raises(ColumnTypeError, match="`metadata`: row 1 holds NaN"):
        checked(batch)


def test_metadata_may_be_named_among_the_columns_and_not_twice_in_the_input() -> None:
    batch = pa.record_batch({"text": IDS, "metadata": IDS})
    assert checked(batch, columns=("metadata",)).schema.names == ["text", "metadata"]
    with pytest.raises(UnknownColumnError, match="metadata"):
        checked(pa.record_batch({"text": IDS}), columns=("metadata",))
    twice = pa.RecordBatch.from_arrays([pa.array(IDS)] * 3, names=["text", "metadata", "metadata"])
    with pytest.raises(InvalidCommandError, match="2 input columns"):
        checked(twice)


def test_ids_of_other_types_are_refused_with_a_remedy() -> None:
    with pytest.raises(ColumnTypeError, match=r"double.*cast whole numbers to int64"):
        checked(pa.record_batch({"text": IDS, "id": [1.0, 2.0, 3.0]}))
    with pytest.raises(ColumnTypeError, match=r"bool, expected strings, UUIDs or integers$"):
        checked(pa.record_batch({"text": IDS, "id": [True, False, None]}))
