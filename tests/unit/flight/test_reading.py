"""Reading of a schema, without a connection."""

from __future__ import annotations

from types import SimpleNamespace

import pyarrow as pa
import pytest

from fletcher.errors import ColumnTypeError
from fletcher.flight.reading import read_schema


def test_names_that_are_no_utf8_are_refused() -> None:
    # Arrow hands them over, and the first to look at the names failed.
    wire = pa.schema({"name": pa.utf8()}).serialize().to_pybytes().replace(b"name", b"na\x80e")
    schema = pa.ipc.read_schema(pa.py_buffer(wire))
    with pytest.raises(ColumnTypeError, match="0x80"):
        read_schema(SimpleNamespace(schema=schema))
