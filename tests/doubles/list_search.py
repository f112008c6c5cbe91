"""Searches of sparse and token vectors, compared with plain loops."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from fletcher.errors import DimensionMismatchError
from fletcher.stores.base import Comparison, Store


def check_list_search(store: Store, dataset: str, sent: pa.Table, output: str) -> None:
    """Search as plain loops do: sparse dot products, or the best match of each query vector."""
    draw = np.random.default_rng(3)
    if output == "sparse":
        query = (draw.random(30_000) * (draw.random(30_000) < 0.3)).astype(np.float32)
        scores = [
            None if row is None else sum(query[one["index"]] * one["value"] for one in row)
            for row in sent["vector"].to_pylist()
        ]
    else:
        query = draw.standard_normal((3, 8)).astype(np.float32)
        unit = [
            None if row is None else [np.array(one) / np.linalg.norm(one) for one in row]
            for row in sent["vector"].to_pylist()
        ]
        asked = query / np.linalg.norm(query, axis=1, keepdims=True)
        scores = [
            None if row is None else sum(max(one @ each for each in row) for one in asked)
            for row in unit
        ]
    best = sorted(
        (
            (score, name)
            for score, name in zip(scores, sent["id"].to_pylist(), strict=True)
            if score is not None
        ),
        reverse=True,
    )[:5]
    found = store.search(dataset, query, k=5, columns=["id"])
    assert found["id"].to_pylist() == [name for _, name in best]
    assert found["score"].to_pylist() == pytest.approx([score for score, _ in best], rel=1e-4)
    with pytest.raises(DimensionMismatchError):
        store.search(dataset, np.ones(7, np.float32), k=3)
    only = store.search(dataset, query, k=90, filters=[Comparison("id", "=", best[2][1])])
    assert only["id"].to_pylist() == [best[2][1]]
