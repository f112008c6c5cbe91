"""Reading of a schema, without a connection."""

from __future__ import annotations

from types import SimpleNamespace

import pyarrow as pa
import pytest

from fletcher.errors import ColumnTypeError, InvalidCommandError
from fletcher.flight.reading import parse_batch_metadata, read_schema


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
