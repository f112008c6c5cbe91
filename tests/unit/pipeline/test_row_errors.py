"""Errors of rows that cannot be embedded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fletcher.pipeline.row_errors import RowErrors


@pytest.mark.parametrize(
    ("ids", "failed"),
    [
        (pa.array(["", "a", None, " ", ""]), [0, 2, 4]),  # rows with "" replaced each other
        (pa.array(["a", "b", "c", "0", "\u200b"]), []),
        (pa.array([0, 1, None, -1, 0]), [2]),
        (pa.array(["x", "", "a", "", None, "y", "z"]).slice(1, 5), [0, 2, 3]),
    ],
)
def test_an_empty_id_is_no_id(ids: pa.Array, failed: list[int]) -> None:
    rows = pa.record_batch({"text": ["t"] * 5, "id": ids})
    errors = RowErrors(rows, np.ones(5, np.int64), 100)
    found: dict[int, Any] = errors.between(0, 5)
    assert sorted(found) == failed
    assert all("`id` is null or empty" in str(one) for one in found.values())
    assert errors.first_between(0, 5) == (failed[0] if failed else None)
