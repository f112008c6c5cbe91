"""Connections to the ports of a Flight store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import pyarrow as pa
from pyarrow import flight

from fletcher.errors import FletcherError, StoreUnavailableError, UnavailableError
from fletcher.net.channel import connect
from fletcher.net.compression import SendCompression
from fletcher.net.flight_errors import from_store_error
from fletcher.stores.address import FlightStoreAddress
from fletcher.stores.exact_search import unknown_dataset

_Answer = TypeVar("_Answer")

# Received buffers lie anywhere; Arrow's filters warn about each that is not aligned.
_READ = pa.ipc.IpcReadOptions(ensure_alignment=pa.ipc.Alignment.DataTypeSpecific)
FAILURES = (pa.ArrowException, flight.FlightError, OSError)


@contextmanager
def store_call(what: str) -> Iterator[None]:
    """Context that turns errors of a Flight call into a `FletcherError`.

    Args:
        what: Description of the call for error messages, such as "writing to dataset `d`".

    Raises:
        RequestError, UnauthenticatedError, UnauthorizedError: The store refuses the call.
        StoreUnavailableError, OverloadedError: The store failed or stalled; retry later.
    """
    try:
        yield
    except FAILURES as error:
        raise from_store_error(error, what) from error


class FlightConnection:
    """Connection to a store: one client per port, a deadline per call. Thread-safe.

    `address` is replaced once the capabilities name the meta port. See `open_store` for the other
    arguments.
    """

    def __init__(
        self, address: FlightStoreAddress, *, timeout_s: float, compression: str, message_bytes: int
    ) -> None:
        self.address = address
        self.message_bytes = message_bytes
        self._timeout_s = timeout_s
        self.compression = SendCompression(
            compression,
            host=address.data.host,
            peer=address.text,
            probe=lambda body: self.run_action("check_readiness", body),
        )
        self._mutex = threading.Lock()
        self._clients: dict[str, flight.FlightClient] = {}

    @property
    def data_client(self) -> flight.FlightClient:
        """Client of the data port. Raises StoreUnavailableError for an unknown host."""
        return self._client(self.address.data.uri)

    @property
    def meta_client(self) -> flight.FlightClient:
        """Client of the meta port. Raises StoreUnavailableError for an unknown host."""
        return self._client(self.address.meta_uri)

    def call_options(
        self, write: pa.ipc.IpcWriteOptions | None = None, *, held_s: float = 0.0
    ) -> flight.FlightCallOptions:
        """Options of one call: its deadline and, for DoPut, the options of its rows.

        Every call has a deadline because a Longbow under memory pressure stalls. `held_s`: time for
        which the call stays open after its work.
        """
        return flight.FlightCallOptions(
            timeout=self._timeout_s + held_s, write_options=write, read_options=_READ
        )

    def run_action(self, name: str, body: Any) -> bytes:
        """Call an action on the data port.

        Args:
            name: The action.
            body: JSON as bytes, or an object to encode.

        Returns:
            The action's first result; empty if the action has no result.

        Raises:
            FletcherError: As `store_call`.
        """
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        with store_call(f"asking for {name}"):
            action = flight.Action(name, raw)
            results = list(self.data_client.do_action(action, self.call_options()))
        return results[0].body.to_pybytes() if results else b""

    def is_up(self) -> bool:
        """Whether the store answers calls, be it with a refusal."""
        try:
            self.run_action("check_readiness", {})
        except FletcherError as error:
            return not isinstance(error, UnavailableError)
        return True

    def ask(self, name: str, request: Any, answer: type[_Answer]) -> _Answer:
        """Call an action on the data port, and decode its answer.

        Raises:
            StoreUnavailableError: The answer has another form; a later one may be right.
            FletcherError: As `run_action`.
        """
        raw = self.run_action(name, request)
        try:
            return msgspec.json.decode(raw, type=answer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StoreUnavailableError(
                f"the store's answer to {name} cannot be read: {error}"
            ) from error

    def open_stream(self, dataset: str, ticket: dict[str, Any], what: str) -> pa.RecordBatchReader:
        """The rows of a DoGet from a dataset.

        Raises:
            UnknownDatasetError: The answer has no schema, which is Longbow's answer for a dataset
                without rows.
            FletcherError: As `store_call`, with `what`.
        """
        return self._do_get(dataset, ticket, what).to_reader()

    def read_schema(self, dataset: str) -> pa.Schema:
        """The schema of a dataset's first rows; no other call of a Longbow tells it.

        Raises:
            FletcherError: As `open_stream`.
        """
        reader = self._do_get(dataset, {}, f"looking for dataset `{dataset}`")
        reader.cancel()
        return reader.schema

    def read_size(self, dataset: str) -> tuple[int, int]:
        """Numbers of batches and bytes of a Longbow's dataset.

        Raises:
            FletcherError: As `open_stream`.
        """
        descriptor = flight.FlightDescriptor.for_path(dataset)
        with _reading(dataset, f"looking for dataset `{dataset}`"):
            info = self.meta_client.get_flight_info(descriptor, self.call_options())
        return info.total_records, info.total_bytes

    def list_flights(self, criteria: bytes) -> list[flight.FlightInfo]:
        """Answer of ListFlights.

        Raises:
            FletcherError: As `store_call`.
        """
        meta = self.address.meta_uri
        what = f"listing datasets on the meta port {meta} (the address's `meta=PORT` sets it)"
        with store_call(what):
            return list(self.meta_client.list_flights(criteria, self.call_options()))

    def list_names(self, criteria: bytes) -> list[str]:
        """Sorted names of the datasets in the answer of ListFlights.

        Raises:
            FletcherError: As `store_call`.
        """
        paths = [one.descriptor.path for one in self.list_flights(criteria)]
        return sorted(path[0].decode(errors="replace") for path in paths if path)

    def _do_get(self, dataset: str, ticket: dict[str, Any], what: str) -> flight.FlightStreamReader:
        raw = flight.Ticket(msgspec.json.encode({"name": dataset, **ticket}))
        with _reading(dataset, what):
            return self.data_client.do_get(raw, self.call_options())

    def close(self) -> None:
        """Close the clients. Idempotent."""
        with self._mutex:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()

    def _client(self, uri: str) -> flight.FlightClient:
        with self._mutex:
            if uri not in self._clients:
                with store_call(f"connecting to {self.address.text}"):
                    self._clients[uri] = connect(uri)
            return self._clients[uri]


@contextmanager
def _reading(dataset: str, what: str) -> Iterator[None]:
    """Context like `store_call` for reads. Without rows, a dataset is unknown."""
    with store_call(what):
        try:
            yield
        except FAILURES as error:
            if _is_unknown(error):
                raise unknown_dataset(dataset) from error
            raise


def _is_unknown(error: Exception) -> bool:
    """Whether a DoGet of a Longbow failed because the dataset has no rows yet."""
    if getattr(error, "extra_info", b""):
        return False  # a `fletcher store` names the cause
    text = str(error)
    return (
        (type(error) is pa.ArrowKeyError and "not found" in text)
        or (type(error) is flight.FlightInternalError and "never sent a data message" in text)
        or (type(error) is pa.ArrowInvalid and "schema" in text.lower())
    )
