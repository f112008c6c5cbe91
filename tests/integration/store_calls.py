"""Longbow's calls in plain pyarrow, as its clients make them."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
from pyarrow import flight

DEADLINE = flight.FlightCallOptions(timeout=30)


def put(
    client: flight.FlightClient,
    dataset: str,
    *batches: pa.RecordBatch,
    metadata: bytes | None = None,
) -> None:
    """Send batches by DoPut."""
    path = flight.FlightDescriptor.for_path(dataset)
    writer, _ = client.do_put(path, batches[0].schema, DEADLINE)
    with writer:
        for batch in batches:
            if metadata is None:
                writer.write_batch(batch)
            else:
                writer.write_with_metadata(batch, metadata)


def get(client: flight.FlightClient, ticket: Any) -> pa.Table:
    """The rows of a ticket: bytes, or an object to encode."""
    raw = ticket if isinstance(ticket, bytes) else json.dumps(ticket).encode()
    return client.do_get(flight.Ticket(raw), DEADLINE).read_all()


def act(client: flight.FlightClient, action: str, body: Any = None) -> list[bytes]:
    """The results of an action; `body` is bytes, or an object to encode."""
    raw = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
    return [one.body.to_pybytes() for one in client.do_action(flight.Action(action, raw), DEADLINE)]
