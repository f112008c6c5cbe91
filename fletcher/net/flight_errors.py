"""The one table between Fletcher's errors and Flight's.

Only Flight's own exceptions carry `extra_info`, and any other exception reaches the client with
the server's traceback in its message, so every handler runs inside `handler_errors`.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
from pyarrow import flight

from fletcher import errors

# By group: an error's own class, else the nearest of its bases, decides. Flight has no status for
# "the request is wrong" that carries extra_info; FlightServerError (gRPC UNKNOWN) comes nearest
# and is not retried by generic clients. Python cannot raise RESOURCE_EXHAUSTED either.
FLIGHT_ERRORS: dict[type[errors.FletcherError], type[flight.FlightError]] = {
    errors.RequestError: flight.FlightServerError,
    errors.UnavailableError: flight.FlightUnavailableError,
    errors.DeadlineExceededError: flight.FlightTimedOutError,
    errors.UnauthenticatedError: flight.FlightUnauthenticatedError,
    errors.UnauthorizedError: flight.FlightUnauthorizedError,
    errors.InternalError: flight.FlightInternalError,
    errors.SetupError: flight.FlightInternalError,
}


# What pyarrow raises without an error of ours inside; the first row that fits counts.
_FOREIGN: tuple[tuple[tuple[type[BaseException], ...], type[errors.FletcherError], str], ...] = (
    (
        (flight.FlightUnauthenticatedError,),
        errors.UnauthenticatedError,
        "the server{} asks for a token",
    ),
    (
        (flight.FlightUnauthorizedError,),
        errors.UnauthorizedError,
        "the server{} does not allow this",
    ),
    (
        (flight.FlightTimedOutError,),
        errors.DeadlineExceededError,
        "the server{} did not answer in time",
    ),
    (
        (pa.ArrowNotImplementedError,),
        errors.InvalidCommandError,
        "the server{} does not offer this call",
    ),
    (
        (flight.FlightServerError, flight.FlightInternalError),
        errors.InternalError,
        "the server{} failed",
    ),
    (
        (flight.FlightError, OSError, pa.ArrowCancelled),
        errors.UnavailableError,
        "the connection to the server{} failed",
    ),
    (
        (pa.ArrowException, ValueError, TypeError),
        errors.InvalidCommandError,
        "the call was refused",
    ),
)

_TAIL = re.compile(
    r"\.? (Detail: \w+|gRPC client debug context: |Client context: |Additionally, could not finish)"
)
_LEAD = re.compile(r"^Flight returned [\w ]+ error, with message: |^Flight error: ")


def flight_error_type(error: errors.FletcherError) -> type[flight.FlightError]:
    """The Flight exception that stands for an error.

    Raises:
        LookupError: The table has no row for it.
    """
    for kind in type(error).__mro__:
        if kind in FLIGHT_ERRORS:
            return FLIGHT_ERRORS[kind]
    raise LookupError(f"{type(error).__name__} has no row in FLIGHT_ERRORS")


def to_flight_error(exc: BaseException, log: logging.Logger | None = None) -> flight.FlightError:
    """What a handler raises for `exc`: its message, and `to_json` as `extra_info`.

    An exception that nobody raised on purpose, or that speaks of this process's own setup, becomes
    `internal` with an incident id; what it was goes to the log alone.
    """
    if isinstance(exc, flight.FlightError):
        return exc
    error: errors.FletcherError
    if isinstance(exc, errors.FletcherError) and not isinstance(exc, errors.SetupError):
        error = exc
    else:
        incident = secrets.token_hex(4)
        (log or logging.getLogger(__name__)).error(
            "incident %s: %s: %s", incident, type(exc).__name__, exc, exc_info=exc
        )
        error = errors.InternalError(
            f"the server failed on this request; its log says more under incident {incident}"
        )
    return flight_error_type(error)(error.message, extra_info=error.to_json())


def without_traceback(error: flight.FlightError) -> Exception:
    """A refusal for `get_schema`, in which pyarrow takes Flight errors for any other exception.

    It sends the message, but neither code nor `extra_info`; and the traceback, unless this cannot
    be written in UTF-8: then it says the exception's name alone.
    """
    refusal = RefusalError(str(error))
    refusal.add_note("\udc80")  # half a surrogate pair, which Python shows below a traceback
    return refusal


class RefusalError(ValueError):
    """What pyarrow sends as INVALID_ARGUMENT."""


@contextmanager
def handler_errors(log: logging.Logger | None = None) -> Iterator[None]:
    """Turns whatever leaves a handler into a Flight error; as `with` or as a decorator.

    As a decorator of a generator it covers the call alone: use `with` inside the generator.
    """
    try:
        yield
    except Exception as exc:  # noqa: BLE001 - the boundary: none may pass as it is
        raise to_flight_error(exc, log) from None


def from_flight_error(exc: BaseException, address: str | None = None) -> errors.FletcherError:
    """The error that a client raises for what pyarrow raised.

    Args:
        exc: Raised by a pyarrow.flight call.
        address: The server's, named in messages about the connection.
    """
    if isinstance(exc, errors.FletcherError):
        return exc
    known = errors.from_json(getattr(exc, "extra_info", b"") or b"")
    if known is not None:
        return known
    where = f" {address}" if address else ""
    if isinstance(exc, flight.FlightUnavailableError) and "Connection refused" in str(exc):
        return errors.UnavailableError(
            f"nothing listens at{where or ' this address'}: connection refused; "
            "check the address and that the server runs"
        )
    if "Destination already closed" in str(exc):  # a write after the call has ended
        return errors.UnavailableError(f"the server{where} ended the call early")
    for kinds, error, words in _FOREIGN:
        if isinstance(exc, kinds):
            return error(f"{words.format(where)}: {clean_message(exc)}")
    return errors.InternalError(f"{type(exc).__name__}: {clean_message(exc)}")


def clean_message(exc: BaseException) -> str:
    """An exception's first line without what gRPC and pyarrow add for their own developers."""
    text = _LEAD.sub("", str(exc).strip())
    text = (_TAIL.split(text, maxsplit=1)[0].splitlines() or [""])[0]
    return text[:500] or type(exc).__name__
