"""Reading of a schema and of messages, without a connection."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.errors import ColumnTypeError, InvalidCommandError
from fletcher.flight.reading import (
    parse_batch_metadata,
    read_messages,
    read_schema,
    wait_first,
)
from fletcher.serving.callers import Caller


class Reader:
    """Flight's reader of some messages: number of rows (None: no batch) and metadata.

    Raises the `end` after them.
    """

    def __init__(self, *messages: tuple[int | None, dict[str, Any]], end: Exception) -> None:
        self._messages = list(messages)
        self._end = end

    def read_chunk(self) -> Any:
        if not self._messages:
            raise self._end
        num_rows, metadata = self._messages.pop(0)
        data = None if num_rows is None else pa.record_batch({"text": [""] * num_rows})
        raw = pa.py_buffer(json.dumps(metadata).encode()) if metadata else None
        return SimpleNamespace(data=data, app_metadata=raw)


def read(
    *messages: tuple[int | None, dict[str, Any]],
    end: Exception | None = None,
    left: bool = False,
    continuous: bool = False,
) -> list[tuple[int, int]]:
    """The number and the first row of each message."""
    caller = Caller(SimpleNamespace(is_cancelled=lambda: left))
    reader = Reader(*messages, end=end or StopIteration())
    found = read_messages(reader, caller, continuous=continuous)
    return [(one.batch_id, one.row_first) for one in found]


@pytest.mark.parametrize(
    "field",
    [
        pa.field("name", pa.utf8()),
        pa.field("x", pa.struct([("name", pa.int8())])),
        pa.field("x", pa.list_(pa.field("name", pa.int8()))),
        pa.field("x", pa.list_(pa.list_(pa.field("name", pa.int8())), 2)),
        pa.field("x", pa.map_(pa.utf8(), pa.struct([("name", pa.int8())]))),
        pa.field("x", pa.dictionary(pa.int8(), pa.struct([("name", pa.int8())]))),
        pa.field("x", pa.timestamp("us", "name")),
    ],
    ids=lambda field: str(field.type),
)
def test_names_that_are_no_utf8_are_refused(field: pa.Field) -> None:
    """Arrow hands them over. Python failed on the outer ones, and LanceDB on the inner ones."""
    wire = pa.schema([field]).serialize().to_pybytes().replace(b"name", b"na\x80e")
    schema = pa.ipc.read_schema(pa.py_buffer(wire))
    with pytest.raises(ColumnTypeError, match="0x80"):
        read_schema(SimpleNamespace(schema=schema))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"row_offset": 0, "row_offset": 3}',
        b'{"batch_id": 1, "batch_id": 1}',
        b'{"end": true, "rows": 5, "rows": null}',
        b'{"row_offset": 0, "row\\u005foffset": 3}',
    ],
)
def test_a_field_of_metadata_is_given_once(raw: bytes) -> None:
    """The last value was taken, and rows got another place than some readers see."""
    with pytest.raises(InvalidCommandError, match="twice"):
        parse_batch_metadata(raw)
    assert parse_batch_metadata(b'{"batch_id":1 , "row_offset" :3}').row_offset == 3


def test_rows_and_batches_are_counted_on_from_what_the_client_named() -> None:
    messages = [
        (3, {}),
        (2, {"batch_id": 7, "row_offset": 10}),
        (4, {}),
        (None, {"end": True, "rows": 16}),
        (1, {"row_offset": 0}),
        (1, {}),
    ]
    assert read(*messages) == [(0, 0), (7, 10), (8, 12), (9, 16), (9, 0), (10, 1)]


def test_a_client_that_leaves_ends_its_messages() -> None:
    assert read((1, {}), end=flight.FlightCancelledError("gone")) == [(0, 0)]
    assert read((1, {}), end=OSError("the stream was reset"), left=True) == [(0, 0)]


def test_messages_that_cannot_be_read_are_errors_and_no_end() -> None:
    with pytest.raises(ColumnTypeError, match="bad offsets"):
        read((1, {}), end=pa.ArrowInvalid("bad offsets"))
    with pytest.raises(ColumnTypeError, match="bad offsets"):
        read((1, {}), end=OSError("bad offsets"))
    with pytest.raises(flight.FlightUnavailableError):
        read((1, {}), end=flight.FlightUnavailableError("no more"))


def test_the_end_of_a_document_belongs_to_a_batch_of_a_continuous_exchange() -> None:
    assert read((0, {"document_end": True}), continuous=True) == [(0, 0)]
    for message, continuous in ((0, False), (None, True)):
        with pytest.raises(InvalidCommandError) as refused:
            read((message, {"document_end": True}), continuous=continuous)
        assert refused.value.field == "document_end"


def test_the_first_message_is_waited_for_and_comes_again() -> None:
    messages, first = wait_first(iter("ab"))  # type: ignore[arg-type]
    assert (first, list(messages)) == ("a", ["a", "b"])
    messages, first = wait_first(iter(()))
    assert (first, list(messages)) == (None, [])
