"""Answers of Flight handlers, checked before pyarrow gets them.

pyarrow ends the process if a schema in an answer is None. It answers other values of a wrong type
with a traceback of the server. The errors here are the server's faults; `handler_errors` logs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import flight


def schema_result(schema: pa.Schema) -> flight.SchemaResult:
    """Answer of `get_schema`. Raises TypeError if there is no schema."""
    return flight.SchemaResult(_checked(schema, pa.Schema, "schema"))


def generator_stream(schema: pa.Schema, batches: Iterable[Any]) -> flight.GeneratorStream:
    """Answer of `do_get`. Raises TypeError if there is no schema."""
    return flight.GeneratorStream(_checked(schema, pa.Schema, "schema"), batches)


def flight_info(
    schema: pa.Schema,
    name: str,
    num_rows: int | None,
    num_bytes: int | None,
    endpoints: Sequence[flight.FlightEndpoint] = (),
) -> flight.FlightInfo:
    """Description of a dataset; None for unknown numbers.

    Raises TypeError if a value has the wrong type.
    """
    numbers = [-1 if one is None else _checked(one, int, "size") for one in (num_rows, num_bytes)]
    return flight.FlightInfo(
        _checked(schema, pa.Schema, "schema"),
        flight.FlightDescriptor.for_path(_checked(name, str, "name")),
        list(endpoints),
        *(max(-1, min(one, 2**63 - 1)) for one in numbers),
    )


def action_results(answer: bytes) -> list[bytes]:
    """Answer of `do_action`. Raises TypeError if it is not bytes."""
    return [_checked(answer, bytes, "answer")]


def _checked(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"the {what} is {type(value).__name__}, expected {kind.__name__}")
    return value
