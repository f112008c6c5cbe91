"""All errors that Fletcher raises on purpose, and their form on the wire.

The right column has each error's code, or says when the error is raised.

FletcherError                      code, message, field, allowed, retry_after_ms
├── RequestError                   the request cannot be done as asked; do not retry unchanged
│   ├── InvalidCommandError        invalid_command
│   ├── UnknownFieldError          unknown_field
│   ├── UnknownModelError          unknown_model
│   ├── UnknownDatasetError        unknown_dataset
│   ├── UnknownColumnError         unknown_column
│   ├── ColumnTypeError            column_type
│   ├── InvalidUtf8Error           invalid_utf8
│   ├── RowTooLargeError           row_too_large
│   ├── BatchTooLargeError         batch_too_large
│   ├── DimensionMismatchError     dimension_mismatch
│   ├── ModelMismatchError         model_mismatch
│   ├── UploadConflictError        upload_conflict
│   ├── NotFiniteError             not_finite
│   ├── UnknownIdError             an id that a dataset lacks (code invalid_command)
│   └── UnsupportedCallError       a call that a server lacks (code invalid_command)
├── UnavailableError               the same request may succeed later; its own code: unavailable
│   ├── OverloadedError            overloaded
│   ├── DrainingError              draining
│   ├── StoreUnavailableError      store_unavailable
│   └── JournalFullError           journal_full
├── DeadlineExceededError          deadline_exceeded
├── CancelledError                 cancelled
├── UnauthenticatedError           unauthenticated
├── UnauthorizedError              unauthorized
├── InternalError                  internal
└── SetupError                     this process cannot start or run as configured (code internal)
    ├── ConfigError                an option, an environment variable or the config file
    ├── ModelError                 a model bundle: missing, damaged, not supported
    ├── BackendError               an engine or device that is missing or cannot run the model
    └── StoreError                 a store address or folder that cannot be used
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar


class FletcherError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: One or two sentences for a person: what was expected, what was found, and a remedy.
            Names of fields are in backticks. Must not contain a traceback or a path on the server.
        field: The command field, column or option at fault, if any.
        allowed: Values that would be accepted.
        retry_after_ms: Shortest wait before the next attempt, for a retryable error.
    """

    code: ClassVar[str] = "internal"

    def __init_subclass__(cls, code: str | None = None) -> None:
        """Set the subclass's code: `code`, or its name as in `unknown_model`."""
        words = re.findall("[A-Z][a-z0-9]*", cls.__name__.removesuffix("Error"))
        cls.code = code or "_".join(words).lower()

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        allowed: Sequence[str] | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        message = _encodable(message)
        super().__init__(message)
        self.message = message
        self.field = None if field is None else _encodable(field)
        self.allowed = list(allowed) if allowed is not None else None
        self.retry_after_ms = retry_after_ms

    def to_dict(self) -> dict[str, Any]:
        """The error as sent on the wire: `code`, `message`, and other fields that are set."""
        names = ("code", "message", "field", "allowed", "retry_after_ms")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to_json(self) -> bytes:
        """The result of `to_dict` as UTF-8 JSON, for the `extra_info` of a Flight error."""
        return json.dumps(self.to_dict(), ensure_ascii=False).encode()

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes pickle errors to send them. By default pickle cannot restore exceptions
        # with keyword-only arguments.
        return _rebuild, (type(self), self.to_dict())


def _encodable(text: str) -> str:
    """Escape unpaired surrogates, which JSON text may hold but UTF-8 cannot encode."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _rebuild(kind: type[FletcherError], fields: dict[str, Any]) -> FletcherError:
    optional = {name: fields.get(name) for name in ("field", "allowed", "retry_after_ms")}
    return kind(fields["message"], **optional)


class RequestError(FletcherError, code="invalid_command"):
    """The request cannot be done as asked."""


class InvalidCommandError(RequestError): ...


class UnknownFieldError(RequestError): ...


class UnknownModelError(RequestError): ...


class UnknownDatasetError(RequestError): ...


class UnknownColumnError(RequestError): ...


class ColumnTypeError(RequestError): ...


class InvalidUtf8Error(RequestError): ...


class RowTooLargeError(RequestError): ...


class BatchTooLargeError(RequestError): ...


class DimensionMismatchError(RequestError): ...


class ModelMismatchError(RequestError): ...


class UploadConflictError(RequestError): ...


class NotFiniteError(RequestError):
    """A vector with NaN, infinity, or a number that its element type cannot hold."""


class UnknownIdError(RequestError, code="invalid_command"):
    """A dataset has no row with the requested id."""


class UnsupportedCallError(RequestError, code="invalid_command"):
    """A server or port does not offer the call or action."""


class UnavailableError(FletcherError):
    """The same request may succeed later.

    Raised as this class, not a subclass, it means that no server answers or that the connection
    broke. Only a client raises it so, and its code `unavailable` is never sent on the wire.
    """


class OverloadedError(UnavailableError): ...


class DrainingError(UnavailableError): ...


class StoreUnavailableError(UnavailableError): ...


class JournalFullError(UnavailableError): ...


class DeadlineExceededError(FletcherError): ...


class CancelledError(FletcherError):
    """The client cancelled the call, let its deadline pass or lost its connection."""


class UnauthenticatedError(FletcherError): ...


class UnauthorizedError(FletcherError): ...


class InternalError(FletcherError): ...


class SetupError(FletcherError, code="internal"):
    """This process cannot start or run as configured."""


class ConfigError(SetupError, code="internal"): ...


class ModelError(SetupError, code="internal"): ...


class BackendError(SetupError, code="internal"): ...


class StoreError(SetupError, code="internal"): ...


def _subclasses(kind: type[FletcherError]) -> list[type[FletcherError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in _subclasses(child))]


# Error classes by code: the leaves of the class tree, without those below SetupError. The first
# class of a code counts.
BY_CODE: dict[str, type[FletcherError]] = {
    kind.code: kind
    for kind in reversed(_subclasses(FletcherError))
    if not kind.__subclasses__() and not issubclass(kind, SetupError)
}


def from_json(extra_info: bytes | str) -> FletcherError | None:
    """The error that `to_json` wrote; None if `extra_info` has another form."""
    try:
        fields = json.loads(extra_info)
        kind = BY_CODE[fields["code"]]
        if not isinstance(fields.get("retry_after_ms") or 0, (int, float)):
            return None
        return _rebuild(kind, fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
