"""Connections to the ports of a Flight store."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pyarrow as pa
from pyarrow import flight

from fletcher.net.compression import Sender
from fletcher.stores.flight.errors import FAILURES, from_store_failure, store_call

# A Flight client blocks after 4-7 MiB that the server has not read; 1-4 MiB keep it flowing.
MESSAGE_BYTES = 2 << 20

_GRPC_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # By default gRPC waits up to two minutes before it reconnects after a long outage.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5000),
]


@dataclass(frozen=True, slots=True)
class FlightAddress:
    """Address of a Flight store.

    Attributes:
        text: As the user wrote it.
        data_uri: Port of rows and searches.
        meta_uri: Port of the dataset list. None: the one that the store's capabilities name, else
            the port after `data_uri`'s, as Longbow does by default.
        profile: `auto`, `longbow` or `fletcher`.
    """

    text: str
    data_uri: str
    meta_uri: str | None
    profile: str

    def with_meta_port(self, port: int) -> FlightAddress:
        """The address with `meta_uri` on the data port's host."""
        return replace(self, meta_uri=_at_port(self.data_uri, port))

    @property
    def effective_meta_uri(self) -> str:
        """`meta_uri`, or the default where it is not set."""
        return self.meta_uri or _at_port(self.data_uri, (urlsplit(self.data_uri).port or 0) + 1)


class FlightConnection:
    """Clients of a store's ports, one each, with a deadline per call. Thread-safe.

    Args:
        address: Of the store. `meta_uri` may be set later.
        timeout_s: Deadline of one call; an append is one call.
        compression: Compression of sent rows; one of `fletcher.config.server.COMPRESSIONS`.
        message_bytes: Approximate size of a message of rows.
    """

    def __init__(
        self,
        address: FlightAddress,
        *,
        timeout_s: float,
        compression: str = "none",
        message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        self.address = address
        self.message_bytes = message_bytes
        self._timeout_s = timeout_s
        self._sender = Sender(
            compression,
            host=urlsplit(address.data_uri).hostname or "",
            peer=address.text,
            probe=lambda body: self.run_action("check_readiness", body),
        )
        self._mutex = threading.Lock()
        self._clients: dict[str, flight.FlightClient] = {}

    @property
    def data_client(self) -> flight.FlightClient:
        """Client of the data port. Raises StoreUnavailableError for an unknown host."""
        return self._client(self.address.data_uri)

    @property
    def meta_client(self) -> flight.FlightClient:
        """Client of the meta port. Raises StoreUnavailableError for an unknown host."""
        return self._client(self.address.effective_meta_uri)

    def call_options(self, write: pa.ipc.IpcWriteOptions | None = None) -> flight.FlightCallOptions:
        """Options of one call: its deadline and, for DoPut, the options of its rows.

        Every call has a deadline because a Longbow under memory pressure stalls.
        """
        return flight.FlightCallOptions(timeout=self._timeout_s, write_options=write)

    def write_options(self, first: pa.RecordBatch) -> pa.ipc.IpcWriteOptions:
        """Compression of a call, chosen by its first batch."""
        return self._sender.options(first)

    def run_action(self, name: str, body: Any) -> bytes:
        """Calls an action on the data port.

        Args:
            name: The action.
            body: Bytes, or what becomes a JSON object.

        Returns:
            Its first result; empty if it has none.

        Raises:
            FletcherError: As `store_call`.
        """
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        with store_call(f"asking for {name}"):
            action = flight.Action(name, raw)
            results = list(self.data_client.do_action(action, self.call_options()))
        return results[0].body.to_pybytes() if results else b""

    def open_stream(self, ticket: dict[str, Any], what: str) -> pa.RecordBatchReader | None:
        """The rows of a DoGet; None for an answer without a schema.

        Raises:
            FletcherError: As `store_call`, with `what`.
        """
        try:
            raw = flight.Ticket(msgspec.json.encode(ticket))
            return self.data_client.do_get(raw, self.call_options()).to_reader()
        except FAILURES as error:
            if type(error) is pa.ArrowInvalid and "schema" in str(error).lower():
                return None
            raise from_store_failure(error, what) from error

    def close(self) -> None:
        """Closes the clients. Idempotent."""
        with self._mutex:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()

    def _client(self, uri: str) -> flight.FlightClient:
        with self._mutex:
            if uri not in self._clients:
                with store_call(f"connecting to {self.address.text}"):
                    self._clients[uri] = flight.FlightClient(uri, generic_options=_GRPC_OPTIONS)
            return self._clients[uri]


def _at_port(uri: str, port: int) -> str:
    parts = urlsplit(uri)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{port}"
