"""The table between Fletcher's errors and pyarrow's, in both directions.

Flight's own exceptions carry `extra_info`, and a `StatusError` gets it from `handler_errors`. If a
handler raises any other exception, pyarrow sends the server's traceback to the client. So every
handler runs inside `handler_errors`.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher import errors
from fletcher.net.trailers import fitted

# Trailer of a gRPC call in which pyarrow's clients and servers pass `extra_info`.
TRAILER = "grpc-status-details-bin"


class StatusError(Exception):
    """An error that pyarrow sends with the gRPC status of its class, here UNKNOWN.

    pyarrow sends its text alone; `handler_errors` adds `extra_info` to the call's trailers. pyarrow
    would add the traceback to the text. If that cannot be encoded as UTF-8, as here, it adds only
    the name of the class.
    """

    def __init__(self, message: str, extra_info: bytes = b"") -> None:
        super().__init__(message)
        self.extra_info = extra_info
        self.add_note("\udc80")  # an unpaired surrogate, which becomes part of the traceback

    __str__ = Exception.__str__  # KeyError puts its text in quotes


class InvalidArgumentError(StatusError, ValueError):
    """gRPC status INVALID_ARGUMENT."""


class NotFoundError(StatusError, KeyError):
    """gRPC status NOT_FOUND."""


class UnimplementedError(StatusError, NotImplementedError):
    """gRPC status UNIMPLEMENTED."""


# Exceptions that may leave a handler.
HANDLER_ERRORS = (flight.FlightError, StatusError)
# An error is looked up by its class, else by the nearest base class. Python code cannot raise
# RESOURCE_EXHAUSTED, ALREADY_EXISTS and FAILED_PRECONDITION.
FLIGHT_ERRORS: dict[type[errors.FletcherError], type[flight.FlightError | StatusError]] = {
    errors.RequestError: InvalidArgumentError,
    errors.UnknownDatasetError: NotFoundError,
    errors.UnknownModelError: NotFoundError,
    errors.UnknownIdError: NotFoundError,
    errors.UnsupportedCallError: UnimplementedError,
    errors.UnavailableError: flight.FlightUnavailableError,
    errors.DeadlineExceededError: flight.FlightTimedOutError,
    errors.CancelledError: flight.FlightCancelledError,
    errors.UnauthenticatedError: flight.FlightUnauthenticatedError,
    errors.UnauthorizedError: flight.FlightUnauthorizedError,
    errors.InternalError: flight.FlightInternalError,
    errors.SetupError: flight.FlightInternalError,
}


_Table = tuple[tuple[tuple[type[BaseException], ...], type[errors.FletcherError], str], ...]
# Errors and messages for pyarrow exceptions that carry no Fletcher error. SERVER_ERRORS is for
# calls to a Fletcher server, STORE_ERRORS for calls to a store. The first row that matches an
# exception is used. In messages `{}` is the server's address or the attempted action.
SERVER_ERRORS: _Table = (
    ((flight.FlightUnauthenticatedError,), errors.UnauthenticatedError, "{} asks for a token"),
    ((flight.FlightUnauthorizedError,), errors.UnauthorizedError, "{} does not allow this"),
    ((flight.FlightTimedOutError,), errors.DeadlineExceededError, "{} did not answer in time"),
    ((pa.ArrowNotImplementedError,), errors.InvalidCommandError, "{} does not offer this call"),
    ((flight.FlightServerError, flight.FlightInternalError), errors.InternalError, "{} failed"),
    (
        (flight.FlightError, OSError, pa.ArrowCancelled),
        errors.UnavailableError,
        "the connection to {} failed",
    ),
    (
        (pa.ArrowException, ValueError, TypeError),
        errors.InvalidCommandError,
        "the call was refused",
    ),
)
# INTERNAL and UNKNOWN count as retryable, because Longbow answers with them when overloaded.
STORE_ERRORS: _Table = (
    (
        (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError),
        errors.UnauthorizedError,
        "the store refused {}",
    ),
    (
        (flight.FlightTimedOutError,),
        errors.StoreUnavailableError,
        "the store did not answer within the deadline while {}",
    ),
    ((pa.ArrowNotImplementedError,), errors.RequestError, "the store refused {}"),
    ((pa.ArrowInvalid, pa.ArrowKeyError), errors.RequestError, "the store refused {}"),
    ((BaseException,), errors.StoreUnavailableError, "the store failed while {}"),
)
# Parts of the messages of errors that a server sent. pyarrow raises the same exceptions for an
# answer that it cannot read; these say nothing about the request.
_SENT = re.compile(
    r"^(Flight|gRPC) returned [\w ]+ error|Detail: Python exception|gRPC client debug context: "
    "(INVALID_ARGUMENT|NOT_FOUND|ALREADY_EXISTS|OUT_OF_RANGE|FAILED_PRECONDITION|UNIMPLEMENTED)"
)
# gRPC's words for the answer of another server than one of gRPC, such as a web server or a proxy.
_OTHER_SERVER = "Received http2 header with status"
# pyarrow has no class for RESOURCE_EXHAUSTED. It raises ArrowInvalid, as for a refused request.
_EXHAUSTED = "gRPC returned resource exhausted error"

_TAIL = re.compile(
    r"\.? (Detail: \w+|gRPC client debug context: |Client context: |Additionally, could not finish)"
)
_LEAD = re.compile(r"^(Flight|gRPC) returned [\w ]+ error, with message: |^Flight error: ")


def flight_error_type(error: errors.FletcherError) -> type[flight.FlightError | StatusError]:
    """The class of the exception that a handler raises for an error."""
    for kind in type(error).__mro__:
        if kind in FLIGHT_ERRORS:
            return FLIGHT_ERRORS[kind]
    raise LookupError(f"{type(error).__name__} has no row in FLIGHT_ERRORS")


def to_flight_error(
    exc: BaseException, log: logging.Logger | None = None
) -> flight.FlightError | StatusError:
    """The exception that a handler raises for `exc`.

    The result has the message of `exc`, and the result of `to_json` as `extra_info`, both cut to
    what trailers bear. A SetupError,
    or an exception that is not a FletcherError, becomes an `internal` error with an incident id.
    Only the log has its details, under that id.
    """
    if isinstance(exc, HANDLER_ERRORS):
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
    error = fitted(error)
    return flight_error_type(error)(error.message, extra_info=error.to_json())


@contextmanager
def handler_errors(
    context: Any, log: logging.Logger | None = None, *, as_status: bool = False
) -> Iterator[None]:
    """Convert any exception of a handler by `to_flight_error`, and add `extra_info`.

    A panic of a Rust library is converted, too, although it is no `Exception`. In a generator, use
    `with` inside the generator.

    Args:
        context: The call's context; None if the handler has none. `extra_info` is then sent with
            Flight errors alone.
        as_status: Raise only status errors, for `get_schema`: there pyarrow sends Flight errors
            with a traceback.
    """
    try:
        yield
    except GeneratorExit:  # the reader of a generator stopped early
        raise
    except BaseException as exc:  # noqa: BLE001 - only these errors may leave a handler
        error = to_flight_error(exc, log)
        if as_status and not isinstance(error, StatusError):
            error = StatusError(str(error), error.extra_info)
        if error is not exc and context is not None and isinstance(error, StatusError):
            context.add_trailer(TRAILER, error.extra_info)
        raise error from None


def from_flight_error(exc: BaseException, address: str | None = None) -> errors.FletcherError:
    """The error that a client raises for an exception from a call to a server.

    `address` is the server's, for the message.
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
    for kinds, kind, words in SERVER_ERRORS:
        if isinstance(exc, kinds):
            return kind(f"{words.format(f'the server{where}')}: {clean_message(exc)}")
    return errors.InternalError(f"{type(exc).__name__}: {clean_message(exc)}")


def from_store_error(exc: BaseException, what: str) -> errors.FletcherError:
    """The error for an exception from a call to a store.

    The error's `field` is `store` if the store is unavailable for all its datasets.

    `what` is the action that was attempted, such as "writing to dataset `d`".
    """
    known = errors.from_json(getattr(exc, "extra_info", b"") or b"")
    if known is not None:
        return store_error(known, what)
    text = clean_message(exc)
    if str(exc).startswith(_EXHAUSTED):
        return errors.OverloadedError(f"the store is overloaded, {what}: {text}", field="store")
    if _OTHER_SERVER in text:
        return errors.StoreUnavailableError(
            f"a web server or a proxy answers instead of the store, {what}: {text}", field="store"
        )
    kind, words = next(row[1:] for row in STORE_ERRORS if isinstance(exc, row[0]))
    if kind is errors.RequestError and not _SENT.search(str(exc)):
        kind, words = errors.StoreUnavailableError, "the store's answer cannot be read, {}"
    unavailable = isinstance(exc, flight.FlightUnavailableError)
    field = "store" if unavailable or kind is not errors.StoreUnavailableError else None
    return kind(f"{words.format(what)}: {text}", field=field)


def store_error(error: errors.FletcherError, what: str) -> errors.FletcherError:
    """The error to raise when a store answers with a Fletcher error.

    Refusals are returned unchanged. All other errors become retryable. They keep the `field` if it
    is `store` or `dataset`.
    """
    refusals = (errors.RequestError, errors.UnauthenticatedError, errors.UnauthorizedError)
    if isinstance(error, refusals):
        return error
    overloaded = isinstance(error, errors.OverloadedError)
    kind = errors.OverloadedError if overloaded else errors.StoreUnavailableError
    return kind(
        f"the store failed while {what}: {error.message}",
        field=error.field if error.field in ("store", "dataset") else None,
        retry_after_ms=error.retry_after_ms,
    )


def clean_message(exc: BaseException) -> str:
    """An exception's first line, without the context that gRPC and pyarrow add."""
    text = _LEAD.sub("", str(exc).strip())
    text = (_TAIL.split(text, maxsplit=1)[0].splitlines() or [""])[0]
    return text[:500] or type(exc).__name__
