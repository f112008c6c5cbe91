"""What the Flight sink and the store server agree on: errors, messages, names of actions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.errors import (
    DeadlineExceededError,
    FletcherError,
    InvalidCommandError,
    OverloadedError,
    RequestError,
    StoreUnavailableError,
    UnauthenticatedError,
    UnauthorizedError,
    UnavailableError,
    from_json,
)

# A Flight client blocks after 4-7 MiB that the server has not read; 1-4 MiB keep it flowing.
MESSAGE_BYTES = 2 << 20

# The first segment of a DoExchange path that stores rows and acknowledges them.
INGEST = "ingest"

# Actions that Longbow has not; a store that answers the first one has the others.
CAPABILITIES = "capabilities"
MISSING_KEYS = "missing-keys"
STORED_RANGES = "stored-ranges"

# pyarrow has no class for RESOURCE_EXHAUSTED: it raises ArrowInvalid, as for a refusal.
_EXHAUSTED = "gRPC returned resource exhausted error"


def slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in pieces of about MESSAGE_BYTES, without a copy."""
    if not batch.num_rows:
        yield batch
        return
    step = max(1, batch.num_rows * MESSAGE_BYTES // max(batch.nbytes, 1))
    for first in range(0, batch.num_rows, step):
        yield batch.slice(first, step)


def to_flight(error: FletcherError) -> flight.FlightError:
    """The Flight error that carries ours in `extra_info`; its text has no traceback."""
    kind: type[flight.FlightError] = flight.FlightServerError
    if isinstance(error, UnavailableError):
        kind = flight.FlightUnavailableError
    elif isinstance(error, DeadlineExceededError):
        kind = flight.FlightTimedOutError
    elif isinstance(error, UnauthenticatedError):
        kind = flight.FlightUnauthenticatedError
    elif isinstance(error, UnauthorizedError):
        kind = flight.FlightUnauthorizedError
    return kind(error.message, extra_info=error.to_json())


def from_flight(error: Exception, what: str) -> FletcherError:
    """Our error for one that a Flight call raised.

    A stall, INTERNAL, UNAVAILABLE and RESOURCE_EXHAUSTED pass by themselves (Longbow says so for
    overload); what is left is a refusal.

    Args:
        error: What pyarrow raised.
        what: What was tried, such as "writing to dataset `d`".
    """
    ours = from_json(getattr(error, "extra_info", b"") or b"")
    if ours is not None:
        return from_store(ours, what)
    text = reason(error)
    if isinstance(error, (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError)):
        return UnauthorizedError(f"the store refused {what}: {text}", field="store")
    if str(error).startswith(_EXHAUSTED):
        return OverloadedError(f"the store is overloaded, {what}: {text}", field="store")
    if isinstance(error, (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError)):
        return RequestError(f"the store refused {what}: {text}", field="store")
    if isinstance(error, flight.FlightTimedOutError):
        text = "no answer within the deadline"
    return StoreUnavailableError(f"the store failed while {what}: {text}", field="store")


def maybe_unknown_action(error: BaseException | None) -> bool:
    """Whether a server that knows nothing of an action may have raised this: UNKNOWN or INTERNAL.

    What has our `extra_info` comes from a server of ours, which has a refusal for that.
    """
    kinds = (flight.FlightServerError, flight.FlightInternalError, pa.ArrowException)
    return type(error) in kinds and not getattr(error, "extra_info", b"")


def from_store(error: FletcherError, what: str) -> FletcherError:
    """Our error for one that a store of Fletcher's answered: a refusal as it is, or it passes."""
    if isinstance(error, (RequestError, UnauthenticatedError, UnauthorizedError)):
        return error
    kind = OverloadedError if isinstance(error, OverloadedError) else StoreUnavailableError
    return kind(
        f"the store failed while {what}: {error.message}",
        field="store",
        retry_after_ms=error.retry_after_ms,
    )


def reason(error: Exception) -> str:
    """The server's own words out of pyarrow's message, which wraps them in gRPC's context."""
    text = str(error)
    for marker in (". gRPC client debug context", ". Client context:", ". Detail: ", "\n"):
        text = text.split(marker, 1)[0]
    for prefix in ("Flight returned ", "gRPC returned "):
        if text.startswith(prefix) and "message: " in text:
            text = text.split("message: ", 1)[1]
    return text[:500]


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
