"""Metadata of fields that LanceDB would act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fletcher.errors import InvalidCommandError
from fletcher.stores.address import open_store
from tests.doubles import store_rows as rows

BLOB = {"lance-encoding:blob": "true"}


def _schema(kind: pa.DataType, metadata: Any = None) -> pa.Schema:
    return rows.schema().append(pa.field("more", kind, metadata=metadata))


@pytest.mark.parametrize(
    ("kind", "metadata", "key"),
    [
        (pa.large_binary(), BLOB, "lance-encoding:blob"),
        (pa.string(), {"lance-encoding:compression": "none of these"}, "lance-encoding:compr"),
        (pa.string(), {"lance-schema:unenforced-primary-key": "true"}, "lance-schema:unenf"),
        (pa.struct([("a", pa.int32())]), {"lance-encoding:packed": "true"}, "lance-encoding:p"),
        (pa.struct([pa.field("a", pa.large_binary(), metadata=BLOB)]), None, "lance-encoding:blob"),
        (pa.list_(pa.field("item", pa.large_binary(), metadata=BLOB)), None, "lance-encoding:blob"),
        (
            pa.map_(pa.string(), pa.struct([pa.field("a", pa.large_binary(), metadata=BLOB)])),
            None,
            "lance-encoding:blob",
        ),
        (pa.string(), {b"\xff": b""}, "\ufffd"),
        (pa.string(), {b"name": b"\xff"}, "name"),
    ],
)
def test_metadata_that_lancedb_acts_on_is_refused_before_the_first_row(
    tmp_path: Path, kind: pa.DataType, metadata: Any, key: str
) -> None:
    # LanceDB made a table of other columns, or one that failed on all rows of all uploads.
    store = open_store(f"lance:{tmp_path}")
    with pytest.raises(InvalidCommandError, match=f"`more` with '{key}"):
        store.open_writer("new", _schema(kind, metadata), "append")
    assert store.dataset("new") is None
    writer = store.open_writer("d", rows.schema(), "append")
    with pytest.raises(InvalidCommandError, match=f"`more` with '{key}"):
        writer.add_columns([_schema(kind, metadata).field("more")])
    writer.append([rows.batch(0, 10)])
    writer.close()
    assert store.scan("d").read_all().num_rows == 10
    store.close()


@pytest.mark.parametrize("metadata", [{"unit": "m"}, {"PARQUET:field_id": "x"}, {"": ""}])
def test_other_metadata_is_kept_beside_the_rows(tmp_path: Path, metadata: dict[str, str]) -> None:
    store = open_store(f"lance:{tmp_path}")
    schema = _schema(pa.large_binary(), metadata)
    writer = store.open_writer("d", schema, "append")
    more = pa.array([b"a", None, b""], pa.large_binary())
    batch = rows.batch(0, 3)
    writer.append([pa.record_batch([*batch.columns, more], schema)])
    writer.close()
    found = store.scan("d").read_all()
    assert found["more"].to_pylist() == more.to_pylist()
    kept = {name.decode(): value.decode() for name, value in found.field("more").metadata.items()}
    assert kept.items() >= metadata.items()
    store.close()
