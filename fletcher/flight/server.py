"""The Flight server: every call of the protocol, each handed on in a line or two."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pyarrow as pa
from pyarrow import flight

from fletcher.config.network import NetworkConfig
from fletcher.core.command import EmbedCommand, check_dataset
from fletcher.core.schema import output_schema
from fletcher.errors import FletcherError, InvalidCommandError, UnknownDatasetError
from fletcher.flight.admin import load_model, set_alias, swap_model, unload_model
from fletcher.flight.auth import Credentials, TokenFactory
from fletcher.flight.commands import encode_models, parse_descriptor, parse_json, parse_list_models
from fletcher.flight.embed_action import embed
from fletcher.flight.ending import Ending
from fletcher.flight.exchange import exchange
from fletcher.flight.put import put
from fletcher.flight.trace import TraceFactory, caller_trace
from fletcher.net.flight_errors import handler_errors, without_traceback
from fletcher.serving.model_manager import ModelManager
from fletcher.serving.service import Service
from fletcher.serving.session import EmbedCall, EmbedSession
from fletcher.stores.base import DatasetInfo

log = logging.getLogger(__name__)

ACTIONS = {
    "health": "Whether the process is alive. No body. Result: JSON",
    "ready": "Whether new calls are let in. No body. Result: JSON",
    "stats": "Counters, durations, queues and workers. No body. Result: JSON",
    "list_models": 'The models. Body: empty or {"format": "json"|"protobuf"}',
    "embed": 'Vectors of a few texts. Body: {"texts": [...], ...EmbedCommand}. Result: JSON',
    "upload_status": 'What is durable. Body: {"upload_id", "dataset"?, "store"?}. Result: JSON',
    "load_model": 'Loads an installed model; answers when it is ready. Body: {"model"}',
    "swap_model": 'Puts the installed version in place of the one that runs. Body: {"model"}',
    "unload_model": 'Takes a model out of service. Body: {"model", "force"?}',
    "set_alias": 'Divides calls. Body: {"alias", "models": "a:0.9,b:0.1"}; no models: removes it',
}


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
            models = self._service.models
            handlers: dict[str, Callable[[bytes], bytes]] = {
                "health": self._health,
                "ready": self._ready,
                "stats": self._stats,
                "list_models": self._list_models,
                "embed": lambda body: self._embed(body, context),
                "upload_status": self._upload_status,
                "load_model": lambda body: self._load(load_model, body, context),
                "swap_model": lambda body: self._load(swap_model, body, context),
                "unload_model": lambda body: _json(unload_model(models, parse_json(body))),
                "set_alias": lambda body: _json(set_alias(models, parse_json(body))),
            }
            if action.type not in handlers:
                raise InvalidCommandError(
                    f"there is no action {action.type[:200]!r}",
                    field="type",
                    allowed=list(handlers),
                )
            return [handlers[action.type](action.body.to_pybytes() if action.body else b"")]

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        return list(ACTIONS.items())

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
            call = EmbedCall(name="get_schema", command=options, given_up=context.is_cancelled)
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

    def _health(self, body: bytes) -> bytes:
        return _json({"status": "ok"})

    def _ready(self, body: bytes) -> bytes:
        models = self._service.models
        ready = models.serves and not self._service.admission.draining.is_set()
        return _json({"ready": ready, "model": models.default.name})

    def _stats(self, body: bytes) -> bytes:
        return _json(self._service.statistics())

    def _list_models(self, body: bytes) -> bytes:
        format_name = parse_list_models(body)
        models = self._service.models
        bundles = models.bundles()
        entries = [
            (bundle, one)
            for one in models.describe()
            if (bundle := bundles.get(f"{one['name']}@{one['hash']}")) is not None
        ]
        return encode_models(entries, models.aliases(), format_name=format_name)

    def _embed(self, body: bytes, context: Any) -> bytes:
        return _json(embed(self._service, parse_json(body), context, caller_trace(context)))

    def _load(
        self,
        load: Callable[[ModelManager, dict[str, Any], Callable[[], bool]], dict[str, Any]],
        body: bytes,
        context: Any,
    ) -> bytes:
        self._service.admission.check_draining()
        return _json(load(self._service.models, parse_json(body), context.is_cancelled))

    def _upload_status(self, body: bytes) -> bytes:
        options = EmbedCommand.from_mapping(parse_json(body))
        return _json(self._service.delivery.upload_status(options))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _flight_info(info: DatasetInfo) -> Any:
    descriptor = flight.FlightDescriptor.for_path(info.name)
    num_bytes = -1 if info.num_bytes is None else info.num_bytes
    return flight.FlightInfo(info.schema, descriptor, [], info.num_rows, num_bytes)


def _json(value: dict[str, Any]) -> bytes:
    # The standard library takes ten times as long for numbers: 0.4 ms for one vector.
    return msgspec.json.encode(value, enc_hook=float)  # NumPy's
