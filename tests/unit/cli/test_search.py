"""Queries of `fletcher search`, and values of all types as it prints them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
from collections.abc import Iterator
from decimal import Decimal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pytest

from fletcher.cli.search import _embed_query, to_rows
from fletcher.cli.terminal import print_json
from fletcher.core.command import EmbedCommand
from fletcher.core.schema import VectorSpec, vector_columns
from fletcher.errors import ColumnTypeError

if TYPE_CHECKING:
    from fletcher.cli.connection import EmbedTarget


def test_values_of_all_types_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    stamp = dt.datetime(2024, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    table = pa.table(
        {
            "us": pa.array([stamp], pa.timestamp("us", "UTC")),
            "ns": pa.array([1_704_164_645_000_000_001], pa.timestamp("ns", "UTC")),
            "naive ns": pa.array([1], pa.timestamp("ns")),
            "time ns": pa.array([1], pa.time64("ns")),
            "day": [stamp.date()],
            "price": [Decimal("1.20")],
            "bytes": [b"\x00\xff"],
            "nothing": pa.nulls(1),
        }
    )
    print_json(to_rows(table)[0])
    assert json.loads(capsys.readouterr().out) == {
        "us": "2024-01-02T03:04:05+00:00",
        "ns": "2024-01-02 03:04:05.000000001Z",
        "naive ns": "1970-01-01 00:00:00.000000001",
        "time ns": "00:00:00.000000001",
        "day": "2024-01-02",
        "price": "1.20",
        "bytes": "00ff",
        "nothing": None,
    }


def test_a_value_that_python_cannot_hold_is_refused_by_name() -> None:
    year_200000 = pa.table({"far": pa.array([200_000 * 366 * 86_400], pa.timestamp("s"))})
    with pytest.raises(ColumnTypeError, match="`columns`"):
        to_rows(year_200000)


def test_a_query_gets_the_width_of_the_dataset_whatever_the_models_default_is() -> None:
    # The width was not asked for if it was the model's full one, and the default came instead.
    spec = VectorSpec("m@0", 8, "float16", 6, "mean", normalized=True)
    schema = pa.schema([], metadata=spec.metadata())
    asked: list[EmbedCommand] = []

    class Server:
        errors = ()

        def list_models(self) -> list[dict[str, Any]]:
            about = {"name": "m", "hash": "0", "is_default": True, "num_layers": 6, "dim": 8}
            return [about | {"prompts": {}}]

        @contextlib.contextmanager
        def exchange(self, _: Any, options: EmbedCommand) -> Iterator[Any]:
            asked.append(options)
            dims = options.dims or 4  # the default
            own = dataclasses.replace(spec, dims=dims, dtype="float32")
            columns = vector_columns(np.ones((1, dims), np.float32), own, None)
            batch = pa.record_batch(columns).replace_schema_metadata(own.metadata())
            yield _Answers([batch])

    class _Answers(list[pa.RecordBatch]):
        errors = ()

    target = SimpleNamespace(
        flags=SimpleNamespace(given={}),
        server=True,
        resolve=lambda **_: None,
        open_client=lambda _: contextlib.nullcontext(Server()),
    )
    assert _embed_query(cast("EmbedTarget", target), "words", None, "d", schema).shape == (8,)
    assert [(one.dims, one.layers) for one in asked] == [(8, 6)]
