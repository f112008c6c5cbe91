"""What the Flight sink and the store server agree on: messages and names of actions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.errors import InvalidCommandError

# A Flight client blocks after 4-7 MiB that the server has not read; 1-4 MiB keep it flowing.
MESSAGE_BYTES = 2 << 20

# The first segment of a DoExchange path that stores rows and acknowledges them.
INGEST = "ingest"

# Actions that Longbow has not; a store that answers the first one has the others.
CAPABILITIES = "capabilities"
MISSING_KEYS = "missing-keys"
STORED_RANGES = "stored-ranges"


def slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in pieces of about MESSAGE_BYTES, without a copy."""
    if not batch.num_rows:
        yield batch
        return
    step = max(1, batch.num_rows * MESSAGE_BYTES // max(batch.nbytes, 1))
    for first in range(0, batch.num_rows, step):
        yield batch.slice(first, step)


def maybe_unknown_action(error: BaseException | None) -> bool:
    """Whether a server that knows nothing of an action may have raised this: UNKNOWN or INTERNAL.

    What has our `extra_info` comes from a server of ours, which has a refusal for that.
    """
    kinds = (flight.FlightServerError, flight.FlightInternalError, pa.ArrowException)
    return type(error) in kinds and not getattr(error, "extra_info", b"")


def decode_object(body: bytes, what: str) -> dict[str, Any]:
    """A JSON object out of an action's body or a ticket; an empty body is an empty object.

    Raises:
        InvalidCommandError: Anything else.
    """
    if not body:
        return {}
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InvalidCommandError(
            f"the body of {what} is {body[:100].decode(errors='replace')!r}, expected a JSON object"
        )
    return fields
