"""The Flight server: every call of the protocol, each handed on in a line or two."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.config.network import NetworkConfig
from fletcher.core.command import check_dataset
from fletcher.core.schema import output_schema
from fletcher.errors import FletcherError, InvalidCommandError, UnknownDatasetError
from fletcher.flight.actions import ACTIONS, run_action
from fletcher.flight.auth import Credentials, TokenFactory
from fletcher.flight.commands import parse_descriptor
from fletcher.flight.ending import Ending
from fletcher.flight.exchange import exchange
from fletcher.flight.put import put
from fletcher.flight.trace import TraceFactory, caller_trace
from fletcher.net.flight_errors import handler_errors, without_traceback
from fletcher.serving.service import Service
from fletcher.serving.session import EmbedCall, EmbedSession
from fletcher.stores.base import DatasetInfo

log = logging.getLogger(__name__)


class FlightServer(flight.FlightServerBase):  # type: ignore[misc]
    """Listens as soon as it is constructed: build it last."""

    def __init__(self, service: Service, network: NetworkConfig, credentials: Credentials) -> None:
        scheme = "grpc+tls" if credentials.tls else "grpc"
        middleware: dict[str, Any] = {"trace": TraceFactory(service.telemetry)}
        if credentials.tokens:
            middleware["token"] = TokenFactory(credentials.tokens)
        super().__init__(
            location=f"{scheme}://{_bracketed(network.host)}:{network.port}",
            tls_certificates=[credentials.tls] if credentials.tls else None,
            verify_client=credentials.client_ca is not None,
            root_certificates=credentials.client_ca,
            middleware=middleware,
        )
        self._service = service
        self.address = f"{scheme}://{_bracketed(network.host)}:{self.port}"

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        with self._handling(), self._service.admission.begin_call():
            options, trace = parse_descriptor(descriptor), caller_trace(context)
            put(self._service, options, context, reader, writer, trace)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        ending, admission = Ending(context, writer), self._service.admission
        with ending, self._handling(), admission.begin_call():
            options, trace = parse_descriptor(descriptor), caller_trace(context)
            exchange(self._service, options, context, reader, writer, trace, ending)

    def do_action(self, context: Any, action: Any) -> list[bytes]:
        with self._handling():
            body = action.body.to_pybytes() if action.body else b""
            return [run_action(self._service, action.type, body, context)]

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        return [(name, action.description) for name, action in ACTIONS.items()]

    def list_flights(self, context: Any, criteria: bytes) -> Iterator[Any]:
        with self._handling():
            delivery = self._service.delivery
            if not delivery.stores:
                return
            _, store = delivery.store(None)
            infos = store.datasets()
        for info in infos:
            yield _flight_info(info)

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:
        with self._handling():
            return _flight_info(self._dataset(descriptor))

    def get_schema(self, context: Any, descriptor: Any) -> Any:
        """A dataset's schema; for a command without a dataset, that of its DoExchange output."""
        try:
            return self._schema(context, descriptor)
        except flight.FlightError as error:
            raise without_traceback(error) from None

    def do_get(self, context: Any, ticket: Any) -> Any:
        """Nothing; pyarrow's own refusal is a traceback."""
        with self._handling():
            raise InvalidCommandError(
                "there is nothing to get: DoExchange gives vectors, and datasets are read from "
                "their store"
            )

    def _schema(self, context: Any, descriptor: Any) -> Any:
        with self._handling():
            options = parse_descriptor(descriptor)
            if options.dataset is not None:
                return flight.SchemaResult(self._dataset(descriptor).schema)
            call = EmbedCall(name="get_schema", command=options, is_cancelled=context.is_cancelled)
            with EmbedSession(self._service, call) as session:
                spec = session.spec
            text = bool(options.include_text)
            return flight.SchemaResult(output_schema(spec, id_type=pa.utf8(), text=text))

    @contextmanager
    def _handling(self) -> Iterator[None]:
        """Counts what goes wrong, and lets nothing but Flight's own errors out."""
        with handler_errors(log):
            try:
                yield
            except Exception as error:
                code = error.code if isinstance(error, FletcherError) else "internal"
                self._service.telemetry.errors.add(code=code)
                raise

    def _dataset(self, descriptor: Any) -> DatasetInfo:
        options = parse_descriptor(descriptor)
        if options.dataset is None:
            raise InvalidCommandError("`dataset` is missing", field="dataset")
        check_dataset(options.dataset)
        _, store = self._service.delivery.store(options.store)
        info = store.dataset(options.dataset)
        if info is None:
            raise UnknownDatasetError(f"there is no dataset {options.dataset!r}", field="dataset")
        return info


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _flight_info(info: DatasetInfo) -> Any:
    descriptor = flight.FlightDescriptor.for_path(info.name)
    num_bytes = -1 if info.num_bytes is None else info.num_bytes
    return flight.FlightInfo(info.schema, descriptor, [], info.num_rows, num_bytes)
