"""Flight errors of a store as errors that say whether a retry helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
from pyarrow import flight

from fletcher.errors import (
    FletcherError,
    OverloadedError,
    RequestError,
    StoreUnavailableError,
    UnauthenticatedError,
    UnauthorizedError,
    from_json,
)
from fletcher.net.flight_errors import clean_message

FAILURES = (pa.ArrowException, flight.FlightError, OSError)

# pyarrow has no class for RESOURCE_EXHAUSTED: it raises ArrowInvalid, as for a refusal.
_EXHAUSTED = "gRPC returned resource exhausted error"


@contextmanager
def store_call(what: str) -> Iterator[None]:
    """Turns what a Flight call raises into a `FletcherError`.

    Args:
        what: The action, for the message, such as "writing to dataset `d`".

    Raises:
        RequestError, UnauthenticatedError, UnauthorizedError: The store refuses the call.
        StoreUnavailableError, OverloadedError: The store failed or stalled; retry later.
    """
    try:
        yield
    except FAILURES as error:
        raise from_store_failure(error, what) from error


def from_store_failure(error: Exception, what: str) -> FletcherError:
    """The `FletcherError` for what a Flight call to a store raised.

    A stall, INTERNAL, UNAVAILABLE and RESOURCE_EXHAUSTED are retryable: Longbow answers them under
    load. Anything else is a refusal.
    """
    answer = from_json(getattr(error, "extra_info", b"") or b"")
    if answer is not None:
        return from_store_answer(answer, what)
    text = clean_message(error)
    if isinstance(error, (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError)):
        return UnauthorizedError(f"the store refused {what}: {text}", field="store")
    if str(error).startswith(_EXHAUSTED):
        return OverloadedError(f"the store is overloaded, {what}: {text}", field="store")
    if isinstance(error, (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError)):
        return RequestError(f"the store refused {what}: {text}", field="store")
    if isinstance(error, flight.FlightTimedOutError):
        text = "no answer within the deadline"
    return StoreUnavailableError(f"the store failed while {what}: {text}", field="store")


def from_store_answer(error: FletcherError, what: str) -> FletcherError:
    """The error that `fletcher store` answered; unless it is a refusal, it becomes retryable."""
    if isinstance(error, (RequestError, UnauthenticatedError, UnauthorizedError)):
        return error
    kind = OverloadedError if isinstance(error, OverloadedError) else StoreUnavailableError
    return kind(
        f"the store failed while {what}: {error.message}",
        field="store",
        retry_after_ms=error.retry_after_ms,
    )


def is_unknown_action(error: BaseException | None) -> bool:
    """Whether a server without an action may have raised this: UNKNOWN or INTERNAL.

    `fletcher store` sends `extra_info` with all its errors, so an error that has it does not count.
    """
    kinds = (flight.FlightServerError, flight.FlightInternalError, pa.ArrowException)
    return type(error) in kinds and not getattr(error, "extra_info", b"")
