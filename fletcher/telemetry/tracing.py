"""Traces, and the export of metrics and traces by OTLP.

`Telemetry` holds the process's instruments. With an OTLP endpoint they are exported and spans are
recorded. Without one a span is a shared object that does nothing, and neither the tracing SDK nor
the exporter is imported.

    telemetry = configure("http://127.0.0.1:4318")
    telemetry.rows_received.add(500)
    with telemetry.span("do_put", parent=telemetry.extract(headers)) as call:
        with telemetry.stage_duration.time(stage="tokenize"):
            ...
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from fletcher.errors import ConfigError
from fletcher.telemetry.metrics import Instruments, own_version

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

EXPORT_TIMEOUT_S = 5.0
COMPLAINT_S = 300.0


class Span:
    """A piece of work in a trace; this one records nothing. Enter it to begin, leave it to end."""

    context: Context | None = None

    def set(self, **attributes: Any) -> None:
        """Adds attributes: strings, numbers, booleans."""

    def headers(self) -> dict[str, str]:
        """`traceparent` for a call to another server; empty where nothing is recorded."""
        return {}

    def end(self, error: BaseException | None = None) -> None:
        """Ends work that began on one thread and ended on another, instead of a `with`."""

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self.end(error)


_NO_SPAN = Span()


class _RecordedSpan(Span):
    def __init__(
        self, tracer: Tracer, name: str, parent: Context | None, attributes: Mapping[str, Any]
    ) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        # An explicit parent, never the thread's own: work changes threads at every stage, and a
        # generator that a server drives would leave its context behind in the server's thread.
        root = parent if parent is not None else Context()
        self._span = tracer.start_span(name, context=root, attributes=dict(attributes))
        self.context = set_span_in_context(self._span, root)

    def set(self, **attributes: Any) -> None:
        self._span.set_attributes(attributes)

    def headers(self) -> dict[str, str]:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, context=self.context)
        return carrier

    def end(self, error: BaseException | None = None) -> None:
        from opentelemetry.trace import Status, StatusCode

        if error is not None:
            self._span.record_exception(error)
            self._span.set_status(Status(StatusCode.ERROR, str(error)))
        self._span.end()


class _Sparing(logging.Filter):
    """Lets a record through, and the next one `COMPLAINT_S` later.

    A collector that is away would otherwise be told of in three lines an export.
    """

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        if record.created < self._quiet_until:
            return False
        self._quiet_until = record.created + COMPLAINT_S
        return True


class Telemetry(Instruments):
    """The instruments of one process and, if an endpoint is configured, their export.

    Args:
        reader: Exports metrics.
        tracer_provider: Records and exports spans; without it they do nothing.
        resource: What both say of this process.
    """

    def __init__(
        self,
        reader: PeriodicExportingMetricReader | None = None,
        tracer_provider: TracerProvider | None = None,
        resource: Resource | None = None,
    ) -> None:
        super().__init__([reader] if reader is not None else [], resource)
        self._exporter = reader
        self._tracer_provider = tracer_provider
        self._tracer: Tracer | None = None
        if tracer_provider is not None:
            self._tracer = tracer_provider.get_tracer("fletcher", own_version())

    def span(self, name: str, parent: Span | Context | None = None, **attributes: Any) -> Span:
        """A span to be used in a `with` statement; it starts now.

        Args:
            name: What is done: `do_put`, `tokenize`, `inference`, ...
            parent: The span that this one is part of, or what `extract` returned.
            attributes: Strings, numbers or booleans.
        """
        if self._tracer is None:
            return _NO_SPAN
        context = parent.context if isinstance(parent, Span) else parent
        return _RecordedSpan(self._tracer, name, context, attributes)

    def extract(self, headers: Mapping[str, str | bytes | Sequence[str | bytes]]) -> Context | None:
        """The trace that a caller's `traceparent` header names; None without one, or unconfigured.

        Args:
            headers: As Flight's middleware has them: lower-case names, lists of values.
        """
        if self._tracer is None or "traceparent" not in headers:
            return None
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {
            name: _first(headers[name]) for name in ("traceparent", "tracestate") if name in headers
        }
        return TraceContextTextMapPropagator().extract(carrier, context=Context())

    def close(self) -> None:
        """Sends what is still waiting and stops exporting. Idempotent.

        Takes about 2 x `EXPORT_TIMEOUT_S` at most where the collector does not answer.
        """
        self._tracer = None
        tracer_provider, self._tracer_provider = self._tracer_provider, None
        if tracer_provider is not None:
            tracer_provider.shutdown()
        # Not the meter provider, which would end `snapshot` as well.
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            exporter.shutdown(timeout_millis=EXPORT_TIMEOUT_S * 1000)


def configure(
    otlp_endpoint: str | None = None,
    *,
    export_interval_s: float = 10.0,
    **service: str,
) -> Telemetry:
    """The process's instruments, exported by OTLP over HTTP where an endpoint is given.

    Args:
        otlp_endpoint: A collector's base address, `http://host:4318`; `/v1/traces` and
            `/v1/metrics` are appended. None: nothing is exported. The standard variables
            `OTEL_EXPORTER_OTLP_HEADERS` and `OTEL_RESOURCE_ATTRIBUTES` are respected.
        export_interval_s: Seconds between two exports of metrics.
        service: More about this server, as resource attributes `service.<name>`.

    Raises:
        ConfigError: The endpoint is no HTTP address, or the exporter is not installed.
    """
    if otlp_endpoint is None:
        return Telemetry()
    if not otlp_endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"`otlp_endpoint` is {otlp_endpoint!r}, expected a collector's address such as "
            "http://127.0.0.1:4318 (OTLP over HTTP)",
            field="otlp_endpoint",
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`otlp_endpoint` is set, but {error.name} is not installed; "
            "pip install 'longbow-fletcher[otlp]'",
            field="otlp_endpoint",
        ) from error
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    for exporter in (OTLPMetricExporter, OTLPSpanExporter):
        logger = logging.getLogger(exporter.__module__)
        if not any(isinstance(one, _Sparing) for one in logger.filters):
            logger.addFilter(_Sparing())
    base = otlp_endpoint.rstrip("/")
    resource = Resource.create(
        {"service.name": "fletcher", "service.version": own_version()}
        | {f"service.{name}": value for name, value in service.items()}
    )
    tracer_provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    tracer_provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(f"{base}/v1/traces", timeout=EXPORT_TIMEOUT_S))
    )
    reader = PeriodicExportingMetricReader(
        OTLPMetricExporter(f"{base}/v1/metrics", timeout=EXPORT_TIMEOUT_S),
        export_interval_millis=export_interval_s * 1000,
    )
    return Telemetry(reader, tracer_provider, resource)


def _first(value: str | bytes | Sequence[str | bytes]) -> str:
    one = value if isinstance(value, (str, bytes)) else value[0]
    return one.decode("ascii", "replace") if isinstance(one, bytes) else one
