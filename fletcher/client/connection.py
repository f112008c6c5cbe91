"""One Flight connection: address, credentials, call options and errors."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from pyarrow import flight

from fletcher.core.command import WIRE_VERSION, EmbedCommand
from fletcher.errors import (
    DeadlineExceededError,
    FletcherError,
    InternalError,
    InvalidCommandError,
    UnavailableError,
)
from fletcher.net.address import parse_address
from fletcher.net.channel import connect
from fletcher.net.compression import SendCompression
from fletcher.net.flight_errors import from_flight_error
from fletcher.util.backoff import Backoff

# Remedies for failed connections, by a part of gRPC's error message.
_REMEDIES = (
    ("certificate verify failed", "name the CA of its certificate (`tls`, --tls-ca)"),
    ("wrong version number", "the server does not use TLS: its address begins with grpc://"),
    ("Failed parsing HTTP/2", "the server speaks another protocol: check the port"),
    ("Socket closed", "if the server uses TLS, its address begins with grpc+tls://"),
)


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """Certificates: paths of PEM files, or their contents as bytes.

    Attributes:
        ca: Trusted root certificates; None: the system's.
        cert: The client's certificate, for servers that ask for one; needs `key`.
        key: The private key of `cert`.
    """

    ca: str | Path | bytes | None = None
    cert: str | Path | bytes | None = None
    key: str | Path | bytes | None = None


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """Transfer settings of uploads and exchanges.

    Attributes:
        message_bytes: Largest message; larger batches are cut. gRPC is fastest with 1 to 4 MiB.
            Larger messages take memory on a slow server.
        window_bytes: Most unacknowledged bytes. A larger window keeps a distant server busy. The
            client keeps these bytes in memory to send them again after a broken connection.
        stall_timeout_s: Longest wait for an answer that the server owes. A call that made no
            progress for so long is not retried.
        max_retries: Most retries in a row without progress before the call fails.
        backoff_s: Pause before the first retry. The pause doubles up to `max_backoff_s`, and half
            of it is random.
        max_backoff_s: Longest pause before a retry.
        compression: Codec of sent batches: `none`, `lz4`, `zstd` (text shrinks 2 to 5 times, for
            CPU time) or `auto`. `auto` measures the first batch and the connection, and takes the
            fastest codec. To a server on the same machine, `auto` is `none`.
    """

    message_bytes: int = 2 << 20
    window_bytes: int = 32 << 20
    stall_timeout_s: float = 600.0
    max_retries: int = 6
    backoff_s: float = 0.2
    max_backoff_s: float = 10.0
    compression: str = "auto"


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Limits inside one call, which only tests change."""

    close_s: float = 5.0  # longest wait for an exchange's call to end
    # Longest wait for the threads of a failed exchange before the exchange starts again. A thread
    # inside the caller's iterator may never return.
    leave_s: float = 2.0
    abandon_s: float = 1.0  # longest wait for the end of an upload's call; then its threads run on
    # Most answers that wait for the caller. Further ones wait in the server, which stops reading.
    max_answers: int = 4
    max_answer_bytes: int = 16 << 20  # most bytes of these answers; a single larger one may wait


class Connection:
    """A FlightClient with its call options; raises FletcherErrors. Thread-safe.

    See `fletcher.connect` for the arguments.

    Raises:
        InvalidCommandError: The address is malformed, or a certificate cannot be read.
    """

    def __init__(
        self,
        uri: str,
        *,
        token: str | None,
        tls: TlsOptions | None,
        timeout_s: float,
        transfer: TransferOptions,
        limits: CallLimits = CallLimits(),
    ) -> None:
        self.address = uri
        self.transfer = transfer
        self.limits = limits
        self._timeout_s = timeout_s
        self._headers = [(b"authorization", b"Bearer " + token.encode())] if token else []
        address = parse_address(uri)
        self.compression = SendCompression(
            transfer.compression,
            host=address.host,
            peer=uri,
            probe=lambda body: self._act("health", body),
        )
        if tls is not None and not address.encrypted:
            raise InvalidCommandError(
                f"`tls` is given, but {uri} is not encrypted; use grpc+tls://", field="tls"
            )
        tls = tls or TlsOptions()
        ca, cert, key = _pem(tls.ca), _pem(tls.cert), _pem(tls.key)
        with self.errors():
            self.flight = connect(address.uri, tls_root_certs=ca, cert_chain=cert, private_key=key)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Context that raises pyarrow's exceptions as FletcherErrors."""
        try:
            yield
        except FletcherError:
            raise
        except (pa.ArrowException, OSError, ValueError, TypeError) as exc:
            # Not chained: a Flight error holds its call's memory for as long as the error is kept.
            raise from_flight_error(exc, self.address) from None

    def check_server(self) -> None:
        """Check that a server answers and accepts the token; see `connect` for errors.

        InvalidCommandError is also raised if another Flight server answers, such as a store.
        """
        try:
            wire = self.action("health").get("wire")
            if wire != WIRE_VERSION:
                raise InvalidCommandError(
                    f"its calls have version {wire or 'unknown'}, and those of this client "
                    f"{WIRE_VERSION}"
                )
        except DeadlineExceededError:
            raise UnavailableError(
                f"{self.address} did not answer within {self._timeout_s:g} s; check the address"
            ) from None
        except UnavailableError as error:
            for sign, remedy in _REMEDIES:
                if sign in error.message:
                    raise UnavailableError(f"{error.message}; {remedy}") from None
            raise
        except InvalidCommandError as error:
            raise InvalidCommandError(
                f"`uri` is {self.address}, expected a Fletcher server: {error.message}; a store "
                "has another address",
                field="uri",
            ) from None

    def action(
        self, name: str, body: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Call an action with a JSON body and return its JSON answer.

        `timeout_s` is the longest wait; None: the connection's `timeout_s`.
        """
        raw = b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
        results = self._act(name, raw, timeout_s)
        try:
            return msgspec.json.decode(results[0].body.to_pybytes(), type=dict[str, Any])
        except (IndexError, msgspec.DecodeError):
            raise InternalError(
                f"{self.address} did not answer `{name}` with a JSON object"
            ) from None

    def stream_options(self, write: pa.ipc.IpcWriteOptions | None = None) -> Any:
        """Call options without a deadline.

        `write` is for DoPut. A DoExchange takes its write options in `writer.begin`.
        """
        return flight.FlightCallOptions(write_options=write, headers=self._headers)

    def _act(self, name: str, body: bytes, timeout_s: float | None = None) -> list[Any]:
        with self.errors():
            timeout_s = self._timeout_s if timeout_s is None else timeout_s
            options = flight.FlightCallOptions(timeout=timeout_s, headers=self._headers)
            return list(self.flight.do_action(flight.Action(name, body), options))

    def retry_delay_s(self, num_failures: int, error: UnavailableError) -> float:
        """Seconds to wait before the next attempt, after `num_failures` in a row."""
        backoff = Backoff(self.transfer.backoff_s, self.transfer.max_backoff_s)
        chance = random.random()  # noqa: S311 - not for secrets
        return backoff.delay_s(num_failures, chance, at_least_ms=error.retry_after_ms)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self.flight.close()


def descriptor(options: EmbedCommand) -> flight.FlightDescriptor:
    """The Flight descriptor of a command."""
    return flight.FlightDescriptor.for_command(options.to_json())


def _pem(path: str | Path | bytes | None) -> bytes | None:
    if path is None or isinstance(path, bytes):
        return path
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidCommandError(
            f"`tls`: cannot read {path}: {error.strerror}", field="tls"
        ) from None
