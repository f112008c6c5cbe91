"""Rows of a group and their keys."""

from __future__ import annotations

import pyarrow as pa
import pytest

from fletcher.delivery.groups import Group, Rows
from fletcher.delivery.upload import Upload, UploadTerms


def rows(
    upload: Upload,
    first: int,
    num_rows: int,
    failed: tuple[int, ...] = (),
    duplicates: tuple[int, ...] = (),
) -> Rows:
    batch = pa.record_batch({"n": list(range(first, first + num_rows))})
    return Rows.from_batch(upload, batch, first, failed, lambda: None, duplicates)


@pytest.mark.parametrize(
    ("exact", "keys"),
    [
        (False, ["u:10-19"] * 7),
        (True, ["u:10-11", "u:10-11", "u:13-15", "u:13-15", "u:13-15", "u:17-17", "u:19-19"]),
    ],
)
def test_exact_keys_name_only_rows_that_are_sent(exact: bool, keys: list[str]) -> None:
    # A store that counts a group's rows could not tell those left out from those it lost.
    upload = Upload("d", "u", UploadTerms("store"))
    group = Group([rows(upload, 10, 5, failed=(2,)), rows(upload, 15, 5, (1,), duplicates=(3,))])
    batch = group.to_batch(null_vectors=False, exact_keys=exact)
    assert batch["n"].to_pylist() == [10, 11, 13, 14, 15, 17, 19]
    assert batch["batch_key"].to_pylist() == keys
    assert group.to_batch(null_vectors=True, exact_keys=exact).num_rows == 9


def test_a_group_of_which_no_row_is_sent_has_no_key() -> None:
    upload = Upload("d", "u", UploadTerms("store"))
    batch = Group([rows(upload, 0, 1, failed=(0,))]).to_batch(null_vectors=False, exact_keys=True)
    assert batch.num_rows == 0
    assert batch.schema.field("batch_key").type == pa.utf8()
