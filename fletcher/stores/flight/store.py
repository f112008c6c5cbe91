"""Store reached by Arrow Flight: a Longbow, or a `fletcher store`."""

from __future__ import annotations

import logging
from dataclasses import replace

import msgspec
import pyarrow as pa
from pyarrow import flight

from fletcher.errors import (
    FletcherError,
    RequestError,
    StoreUnavailableError,
    UnauthenticatedError,
    UnauthorizedError,
    UnavailableError,
)
from fletcher.stores import protocol
from fletcher.stores.base import (
    DatasetInfo,
    DatasetWriter,
    Filters,
    Names,
    Store,
    StoreCapabilities,
    Vector,
    WriteMode,
)
from fletcher.stores.flight.connection import FlightConnection
from fletcher.stores.flight.fletcher_server import FletcherServer
from fletcher.stores.flight.longbow_server import LongbowServer
from fletcher.stores.schemas import check_storable
from fletcher.stores.staging import check_stored, staged_for

_log = logging.getLogger(__name__)


class FlightStore(Store):
    """A Flight store; connects on first use. Thread-safe, except for its writers.

    Each kind of server has its class, which the profile in the store's address names. `auto` asks
    the server for its capabilities, and means `longbow` if it reports none.

    Args:
        connection: Connection to the store; `close` closes it, too.
    """

    def __init__(self, connection: FlightConnection) -> None:
        self.address = connection.address.text
        self._connection = connection
        self._found: FletcherServer | LongbowServer | None = None

    @property
    def _server(self) -> FletcherServer | LongbowServer:
        if self._found is None:
            self._found = self._find_server()
        return self._found

    @property
    def capabilities(self) -> StoreCapabilities:
        return self._server.capabilities

    def open_writer(self, dataset: str, schema: pa.Schema, mode: WriteMode) -> DatasetWriter:
        check_stored(dataset)
        check_storable(schema)
        return self._server.open_writer(dataset, schema, mode)

    def datasets(self) -> list[DatasetInfo]:
        return [info for info in self._server.datasets() if staged_for(info.name) is None]

    def staged_datasets(self) -> list[DatasetInfo]:
        found = self._server.staged_datasets()
        return [info for info in found if staged_for(info.name) is not None]

    def dataset(self, name: str) -> DatasetInfo | None:
        check_stored(name)
        return self._server.dataset(name)

    def read_schema(self, name: str) -> pa.Schema | None:
        check_stored(name)
        return self._server.read_schema(name)

    def incarnation(self, name: str) -> str | None:
        check_stored(name)
        return self._server.incarnation(name)

    def replace_dataset(self, name: str, staged: str) -> None:
        check_stored(name)
        self._server.replace_dataset(name, staged)

    def delete_upload(self, dataset: str, upload_id: str) -> int:
        check_stored(dataset)
        return self._server.delete_upload(dataset, upload_id)

    def stored_ranges(self, dataset: str, upload_id: str) -> list[tuple[int, int]]:
        check_stored(dataset)
        return self._server.stored_ranges(dataset, upload_id)

    def scan(
        self, name: str, *, columns: Names = None, filters: Filters = (), limit: int | None = None
    ) -> pa.RecordBatchReader:
        check_stored(name)
        return self._server.scan(name, columns=columns, filters=filters, limit=limit)

    def search(
        self, dataset: str, vector: Vector, *, k: int, columns: Names = None, filters: Filters = ()
    ) -> pa.Table:
        check_stored(dataset)
        return self._server.search(dataset, vector, k=k, columns=columns, filters=filters)

    def delete_dataset(self, name: str) -> None:
        check_stored(name)
        self._server.delete_dataset(name)

    def close(self) -> None:
        """Close a Longbow's writers, and the connections. Idempotent."""
        (self._found or self._connection).close()

    def _find_server(self) -> FletcherServer | LongbowServer:
        address = self._connection.address
        if address.profile == "longbow":
            return LongbowServer(self._connection)
        try:
            answer = self._connection.run_action(protocol.CAPABILITIES, {})
            can = msgspec.json.decode(answer, type=protocol.CapabilitiesAnswer)
        except UnavailableError as error:
            # Longbow reports an unknown action as an internal error, so check whether Longbow is
            # up.
            unknown = _is_unknown_action(error.__cause__)
            if address.profile == "fletcher" or not unknown or not self._connection.is_up():
                refused = "connection refused" in error.message.lower()
                reason = "connection refused" if refused else error.message
                raise StoreUnavailableError(
                    f"the store {self.address} does not answer: {reason}; check its address and "
                    "that it runs",
                    field="store",
                    retry_after_ms=error.retry_after_ms,
                ) from error
            _log.debug("%s has no capabilities: %s", self.address, error)
        except (UnauthenticatedError, UnauthorizedError):
            raise
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            # A Longbow refuses the question. This may be a store of Fletcher.
            raise StoreUnavailableError(
                f"the answer of the store {self.address} to capabilities cannot be read: {error}",
                field="store",
            ) from error
        except FletcherError as error:
            if address.profile == "fletcher":
                raise RequestError(
                    f"`profile` is fletcher, and the store at {self.address} does not answer "
                    "`capabilities`; leave `profile=fletcher` out",
                    field="store",
                ) from error
        else:
            if address.meta is None and can.meta_port:
                meta = address.data.with_port(can.meta_port)
                self._connection.address = replace(address, meta=meta)
            capabilities = msgspec.convert(can, StoreCapabilities, from_attributes=True)
            return FletcherServer(self._connection, capabilities)
        _log.info("%s speaks Longbow's contract", self.address)
        return LongbowServer(self._connection)


def _is_unknown_action(error: BaseException | None) -> bool:
    """Whether the error may mean an action that the server lacks: UNKNOWN or INTERNAL.

    `fletcher store` sends `extra_info` with all its errors, so an error that has it does not count.
    """
    kinds = (flight.FlightServerError, flight.FlightInternalError, pa.ArrowException)
    return type(error) in kinds and not getattr(error, "extra_info", b"")
