"""Values of all types as `fletcher search` prints them."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal

import pyarrow as pa
import pytest

from fletcher.cli.search import _to_rows
from fletcher.cli.terminal import print_json
from fletcher.errors import ColumnTypeError


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
    print_json(_to_rows(table)[0])
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
        _to_rows(year_200000)
