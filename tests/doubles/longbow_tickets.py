"""Tickets, filters and errors of the stand-in for Longbow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

SEARCH_KEYS = {
    "dataset", "vector", "vectors", "k", "filters", "text_query", "alpha", "graph_alpha",
    "local_only", "include_vectors", "vector_format",
}  # fmt: skip
_TESTS: tuple[tuple[tuple[str, ...], Callable[[Any, Any], Any]], ...] = (
    (("=", "==", "eq"), np.equal), (("!=", "neq"), np.not_equal),
    ((">", "gt"), np.greater), (("<", "lt"), np.less),
    ((">=", "ge"), np.greater_equal), (("<=", "le"), np.less_equal),
)  # fmt: skip
TESTS = {name: test for names, test in _TESTS for name in names}
_PLAIN = re.compile(r"-?\d+(\.\d+)?")
_VALUES = {
    pa.utf8(): str, pa.int64(): int, pa.float32(): np.float32, pa.float64(): float,
}  # fmt: skip


def missing(text: str) -> Exception:
    return pa.ArrowKeyError(text)


def invalid(text: str) -> Exception:
    return pa.ArrowInvalid(text)


def unimplemented(text: str) -> Exception:
    return pa.ArrowNotImplementedError(text)


class Parser:
    """Reads tickets. A bare name inherits the filters of the ticket before it, as in Longbow."""

    def __init__(self) -> None:
        self._filters: list[dict[str, Any]] = []

    def parse(self, ticket: bytes) -> dict[str, Any]:
        if not ticket.startswith(b"{"):
            return {"name": ticket.decode(), "filters": self._filters}
        # Numbers stay text, as only plain ones are read.
        query = json.loads(ticket, parse_float=_Number, parse_int=_Number)
        search = query.get("search") or {}
        filters = [*query.get("filters", []), *search.get("filters", [])]
        if set(search) - SEARCH_KEYS or not all(_is_plain(one.get("value")) for one in filters):
            raise invalid("invalid ticket format")
        query.setdefault("filters", [])
        self._filters = query["filters"]
        if search:
            search["vector"] = [float(one) for one in search["vector"]]
            search["k"] = int(search["k"])
        return query


class _Number(str):
    """A number as it is written in a ticket."""


def _is_plain(value: Any) -> bool:
    if isinstance(value, _Number):
        return _PLAIN.fullmatch(value) is not None
    return isinstance(value, str)


def filter_rows(batch: pa.RecordBatch, filters: list[dict[str, Any]]) -> Any:
    """Which rows meet all filters; None if that fails.

    Filters on columns that are unknown, or of a type that cannot be compared, are skipped if there
    is another one. `logic` is ignored.
    """
    met = np.ones(batch.num_rows, bool)
    bound = False
    for one in filters:
        name = one["field"]
        kind = batch.schema.field(name).type if name in batch.schema.names else None
        if kind not in _VALUES:
            continue
        bound = True
        try:
            value = _VALUES[kind](one["value"])
        except ValueError:
            return None
        test = TESTS.get(one.get("operator") or one.get("op") or "=")
        if test is None:
            met[:] = False
            continue
        column = batch[name]
        rows = column.is_valid().to_numpy(zero_copy_only=False)
        values = column.drop_null().to_numpy(zero_copy_only=False)
        met[rows] &= np.asarray(test(values, value), bool)
        met &= rows
    return met if bound or not filters else None


def text_id(value: Any) -> str:
    """A stored id as actions name it."""
    return str(value)
