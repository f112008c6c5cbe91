"""The Flight server, which passes each call of the protocol to its handler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.config.network import NetworkConfig
from fletcher.core.command import EmbedCommand
from fletcher.core.schema import output_schema
from fletcher.errors import (
    FletcherError,
    InvalidCommandError,
    UnknownDatasetError,
    UnsupportedCallError,
)
from fletcher.flight.actions import ACTIONS, run_action
from fletcher.flight.answers import AnswerWriter
from fletcher.flight.commands import parse_descriptor
from fletcher.flight.exchange import exchange
from fletcher.flight.middleware import Credentials, TokenFactory, TraceFactory
from fletcher.flight.put import put
from fletcher.net.address import FlightAddress
from fletcher.net.connections import ServerConnections
from fletcher.net.flight_answers import (
    action_results,
    action_types,
    flight_info,
    flight_list,
    schema_result,
)
from fletcher.net.flight_errors import handler_errors
from fletcher.serving.callers import CallWatch
from fletcher.serving.service import Service
from fletcher.serving.session import EmbedCall, EmbedSession
from fletcher.stores.base import DatasetInfo

log = logging.getLogger(__name__)


class FlightServer(flight.FlightServerBase):  # type: ignore[misc]
    """Flight server, which listens as soon as it is constructed.

    Args:
        service: The server's parts.
        network: Address to listen on.
        credentials: Tokens and TLS keys.
        idle_timeout_s: How long a call's client may be silent; 0: without limit.

    Attributes:
        address: The server's address in the form that clients use, with the port in use.
    """

    def __init__(
        self,
        service: Service,
        network: NetworkConfig,
        credentials: Credentials,
        idle_timeout_s: float = 0.0,
    ) -> None:
        # Before the server listens: a call may come at once.
        self._service = service
        connections = ServerConnections()
        self._callers = CallWatch(idle_timeout_s, connections)
        host, encrypted = network.host.strip("[]"), credentials.tls is not None
        address = FlightAddress(host, network.port, encrypted)
        middleware: dict[str, Any] = {"trace": TraceFactory(service.telemetry)}
        if credentials.tokens or credentials.own_token:
            middleware["token"] = TokenFactory(credentials.tokens, credentials.own_token)
        super().__init__(
            location=address.uri,
            tls_certificates=[credentials.tls] if credentials.tls else None,
            verify_client=credentials.client_ca is not None,
            root_certificates=credentials.client_ca,
            middleware=middleware,
        )
        connections.port = self.port
        self._callers.start()
        self.address = address.with_port(self.port).uri

    def end_calls(self) -> None:
        """End the connections of all open calls, and with them reads that block."""
        self._callers.close()

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        admission, watch = self._service.admission, self._callers.watch(context)
        with self._handling(context), admission.begin_call(), watch as caller:
            put(self._service, parse_descriptor(descriptor), caller, reader, writer)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        answers, admission = AnswerWriter(context, writer), self._service.admission
        with answers, self._handling(context), admission.begin_call():
            command = parse_descriptor(descriptor)
            with self._callers.watch(context) as caller:
                exchange(self._service, command, caller, reader, answers)

    def do_action(self, context: Any, action: Any) -> list[bytes]:
        with self._handling(context), self._callers.watch(context) as caller:
            body = action.body.to_pybytes() if action.body else b""
            return action_results(run_action(self._service, action.type, body, caller))

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        with self._handling(context):
            return action_types({name: action.description for name, action in ACTIONS.items()})

    def list_flights(self, context: Any, criteria: bytes) -> Iterator[Any]:
        with self._handling(context):
            delivery = self._service.delivery
            if not delivery.stores:
                return flight_list([])
            _, store = delivery.store(None)
            return flight_list([_flight_info(info) for info in store.datasets()])

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:
        with self._handling(context):
            return _flight_info(self._dataset(parse_descriptor(descriptor)))

    def get_schema(self, context: Any, descriptor: Any) -> Any:
        """Schema of the command's dataset; without a dataset, of a DoExchange's output."""
        with self._handling(context, as_status=True):
            command = parse_descriptor(descriptor)
            if command.dataset is not None:
                return schema_result(self._dataset(command).schema)
            call = EmbedCall(name="get_schema", command=command)
            with EmbedSession(self._service, call) as session:
                spec = session.spec
            text = bool(command.include_text)
            return schema_result(output_schema(spec, id_type=pa.utf8(), text=text))

    def do_get(self, context: Any, ticket: Any) -> Any:
        """Refuse every call.

        pyarrow's own error would contain a traceback.
        """
        with self._handling(context):
            raise UnsupportedCallError(
                "DoGet is not supported; ask for vectors by DoExchange, and read datasets from "
                "their store"
            )

    @contextmanager
    def _handling(self, context: Any, *, as_status: bool = False) -> Iterator[None]:
        """Count errors, and raise them as `handler_errors` does."""
        with handler_errors(context, log, as_status=as_status):
            try:
                yield
            except BaseException as error:
                code = error.code if isinstance(error, FletcherError) else "internal"
                self._service.telemetry.errors.add(code=code)
                raise

    def _dataset(self, command: EmbedCommand) -> DatasetInfo:
        if command.dataset is None:
            raise InvalidCommandError("`dataset` is missing", field="dataset")
        _, store = self._service.delivery.store(command.store)
        info = store.dataset(command.dataset)
        if info is None:
            raise UnknownDatasetError(f"there is no dataset {command.dataset!r}", field="dataset")
        return info


def _flight_info(info: DatasetInfo) -> Any:
    return flight_info(info.schema, info.name, info.num_rows, info.num_bytes)
