"""The protocol in plain pyarrow, as a client in any language uses it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pyarrow as pa
from pyarrow import flight

TIMEOUT = flight.FlightCallOptions(timeout=60)


def command(**fields: Any) -> flight.FlightDescriptor:
    return flight.FlightDescriptor.for_command(json.dumps(fields).encode())


def action(client: flight.FlightClient, name: str, body: Any = b"") -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    (result,) = client.do_action(flight.Action(name, raw), TIMEOUT)
    return json.loads(result.body.to_pybytes())


def put(
    client: flight.FlightClient,
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    *,
    end: int | None = None,
    options: flight.FlightCallOptions = TIMEOUT,
    **fields: Any,
) -> list[dict[str, Any]]:
    """Sends batches; returns all acknowledgements, the summary last."""
    writer, reader = client.do_put(command(**fields), schema, options)
    answers: list[dict[str, Any]] = []

    def read() -> None:
        try:
            while (answer := reader.read()) is not None:
                answers.append(json.loads(answer.to_pybytes()))
        except (flight.FlightError, StopIteration):
            pass  # the writer reports it

    thread = threading.Thread(target=read)
    thread.start()
    try:
        with suppress(flight.FlightError, pa.ArrowException, OSError):  # `close` tells what it was
            for batch in batches:
                writer.write_batch(batch)
            if end is not None:
                writer.write_metadata(json.dumps({"end": True, "rows": end}).encode())
    finally:
        # A write fails when the call has ended, and reading ends with it. Only then is it closed:
        # pyarrow may crash where a call is closed under a thread that reads.
        with suppress(flight.FlightError, pa.ArrowException, OSError):
            writer.done_writing()
        thread.join(90)
        assert not thread.is_alive()
    writer.close()
    return answers


def exchange(
    client: flight.FlightClient,
    batches: list[pa.RecordBatch],
    schema: pa.Schema,
    *,
    options: flight.FlightCallOptions = TIMEOUT,
    **fields: Any,
) -> list[tuple[pa.RecordBatch, dict[str, Any]]]:
    """Sends batches in one thread and reads answers in another."""
    writer, reader = client.do_exchange(command(**fields), options)

    def write() -> None:
        try:
            writer.begin(schema)
            for batch in batches:
                writer.write_batch(batch)
            writer.done_writing()
        except (flight.FlightError, pa.ArrowException, OSError):
            pass  # `close` tells what it was

    thread = threading.Thread(target=write)
    thread.start()
    answers = []
    with suppress(StopIteration, flight.FlightError):  # `close` tells what it was
        while True:
            chunk = reader.read_chunk()
            answers.append((chunk.data, json.loads(chunk.app_metadata.to_pybytes())))
    thread.join(90)
    assert not thread.is_alive()
    writer.close()
    return answers


def error_of(exc: flight.FlightError) -> dict[str, Any]:
    """The `extra_info` of an error."""
    return json.loads(exc.extra_info)
