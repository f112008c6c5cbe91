"""Answers of Flight handlers, checked before pyarrow gets them.

pyarrow ends the process if a schema or a batch in an answer is None. It answers other values of a
wrong type with a traceback of the server. Every handler of every server therefore makes its answer
here. The errors are the server's faults; `handler_errors` logs them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.core.command import MAX_ANSWER_BYTES
from fletcher.net.flight_errors import handler_errors
from fletcher.net.message_size import OVERHEAD_BYTES, cut_batch

_log = logging.getLogger(__name__)


def schema_result(schema: pa.Schema) -> flight.SchemaResult:
    """Answer of `get_schema`. Raises TypeError if there is no schema."""
    return flight.SchemaResult(_checked(schema, pa.Schema, "schema"))


def generator_stream(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> flight.GeneratorStream:
    """Answer of `do_get`. Raises TypeError if there is no schema.

    Batches are cut to messages of at most MAX_ANSWER_BYTES. A batch that is none, or has another
    schema, ends the call with an error.
    """
    _checked(schema, pa.Schema, "schema")
    return flight.GeneratorStream(schema, _checked_batches(schema, batches))


def table_stream(table: pa.Table) -> flight.GeneratorStream:
    """Answer of `do_get`. Raises TypeError if there is no table."""
    _checked(table, pa.Table, "table")
    return generator_stream(table.schema, table.to_batches())


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


def flight_list(infos: Iterable[flight.FlightInfo]) -> Iterator[flight.FlightInfo]:
    """Answer of `list_flights`. Raises TypeError if a value has the wrong type."""
    return iter([_checked(info, flight.FlightInfo, "dataset") for info in infos])


def action_results(answers: Sequence[bytes]) -> list[bytes]:
    """Answer of `do_action`. Raises TypeError if a result is not bytes."""
    return [_checked(one, bytes, "answer") for one in _checked(answers, list, "answer")]


def action_types(descriptions: Mapping[str, str]) -> list[tuple[str, str]]:
    """Answer of `list_actions`. Raises TypeError if a description is not text."""
    return [(name, _checked(text, str, "description")) for name, text in descriptions.items()]


def _checked_batches(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    with handler_errors(None, _log):
        for batch in batches:
            if not _checked(batch, pa.RecordBatch, "batch").schema.equals(schema):
                raise TypeError("a batch has another schema than the answer")
            yield from cut_batch(batch, MAX_ANSWER_BYTES - OVERHEAD_BYTES)


def _checked(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"the {what} is {type(value).__name__}, expected {kind.__name__}")
    return value
