"""Tokens and TLS keys of the server, and checks of calls before handlers run."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import flight

from fletcher.config.network import NetworkConfig
from fletcher.core.command import EmbedCommand
from fletcher.core.owner import certificate_owner, token_owner
from fletcher.errors import ConfigError, UnauthenticatedError
from fletcher.net.flight_errors import to_flight_error
from fletcher.serving.callers import Caller
from fletcher.serving.session import EmbedCall
from fletcher.telemetry.tracing import Telemetry


@dataclass(frozen=True, slots=True)
class Credentials:
    """Contents of the files that `NetworkConfig` names."""

    tokens: tuple[str, ...] = ()  # accepted bearer tokens; empty: every caller is accepted
    tls: tuple[bytes, bytes] | None = None  # PEM certificate and key
    client_ca: bytes | None = None  # PEM CA of callers' certificates; if set, callers need one
    own_token: str = ""  # accepted from the server's own process, whose uploads are anonymous

    @classmethod
    def from_config(cls, config: NetworkConfig) -> Credentials:
        """Read the files. Raises ConfigError if a file cannot be read."""
        cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
        return cls(
            tokens=_read_tokens(config.token_file) if config.token_file else (),
            tls=(_read(cert, "tls_cert"), _read(key, "tls_key")) if cert and key else None,
            client_ca=_read(client_ca, "tls_client_ca") if client_ca else None,
        )


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"`{field}` cannot be read: {error.strerror}", field=field) from None


def _read_tokens(path: Path) -> tuple[str, ...]:
    """Read a file with one token per line; ignore blank lines and `#` comments."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`token_file` cannot be read: {error}", field="token_file") from None
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        raise ConfigError("`token_file` holds no token; put one on each line", field="token_file")
    return tokens


class TokenFactory(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Middleware that refuses calls without an accepted bearer token.

    It tells the handler whose token it is. A caller with `own_token` is anonymous.
    """

    def __init__(self, tokens: tuple[str, ...], own_token: str = "") -> None:
        super().__init__()
        self._owners = [(one.encode(), token_owner(one.encode())) for one in tokens]
        if own_token:
            self._owners.append((own_token.encode(), ""))

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> _Owner:
        """Check one call's token, in constant time. Raises FlightUnauthenticatedError."""
        values = headers.get("authorization") or headers.get("Authorization") or [""]
        scheme, _, token = values[0].partition(" ")
        if scheme.lower() != "bearer" or not token:
            error = UnauthenticatedError(
                "the call has no token; send the header `authorization: Bearer TOKEN`",
                field="authorization",
            )
            raise to_flight_error(error)
        # Every token is compared, so that the time taken reveals nothing.
        given = token.strip().encode()
        found = [owner for one, owner in self._owners if hmac.compare_digest(given, one)]
        if not found:
            error = UnauthenticatedError("the token is not valid", field="authorization")
            raise to_flight_error(error)
        return _Owner(found[-1])


class _Owner(flight.ServerMiddleware):  # type: ignore[misc]
    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner


class _Trace(flight.ServerMiddleware):  # type: ignore[misc]
    def __init__(self, trace: Any) -> None:
        super().__init__()
        self.trace = trace


class TraceFactory(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Middleware that hands the trace in the header `traceparent` to the handler.

    gRPC's own instrumentation does not cover pyarrow.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        super().__init__()
        self._telemetry = telemetry

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> _Trace | None:
        """The trace named in the headers, if traces are recorded."""
        trace = self._telemetry.extract(headers)
        return None if trace is None else _Trace(trace)


def upload_owner(caller: Caller) -> str:
    """The owner of a caller's uploads; empty: anonymous.

    It is the caller's token, else its certificate.
    """
    middleware = caller.get_middleware("token")
    if middleware is not None:
        return str(middleware.owner)
    name = caller.peer_identity()
    return certificate_owner(name) if name else ""


def embed_call(
    name: str, command: EmbedCommand, caller: Caller, *, abort: bool = False
) -> EmbedCall:
    """Arguments of a session, with the caller and its trace."""
    middleware = caller.get_middleware("trace")
    return EmbedCall(
        name=name,
        command=command,
        abort=abort,
        trace=None if middleware is None else middleware.trace,
        caller=caller,
    )
