"""Traces, and the export of metrics and traces by OTLP.

`Telemetry` holds the metrics of one process. With an OTLP endpoint they are exported and spans are
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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from fletcher.errors import ConfigError
from fletcher.telemetry.metrics import Instruments, own_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


@dataclass(frozen=True, slots=True)
class ExportTiming:
    """Intervals of the export, in seconds.

    Attributes:
        interval_s: Between two exports of metrics.
        timeout_s: Longest wait for the collector's answer.
        quiet_s: Between two log lines about a collector that does not answer.
    """

    interval_s: float = 10.0
    timeout_s: float = 5.0
    quiet_s: float = 300.0


class Span:
    """An operation in a trace; this one records nothing. It starts when it is made."""

    context: Context | None = None

    def set_attributes(self, **attributes: Any) -> None:
        """Add attributes: strings, numbers, booleans."""

    def headers(self) -> dict[str, str]:
        """`traceparent` for a call to another server; empty if nothing is recorded."""
        return {}

    def end(self, error: BaseException | None = None) -> None:
        """End a span outside a `with` statement, such as on another thread."""

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self.end(error)


_NO_SPAN = Span()


class _RecordedSpan(Span):
    def __init__(
        self, tracer: Tracer, name: str, parent: Context | None, attributes: Mapping[str, Any]
    ) -> None:
        # An explicit parent instead of the thread's context: an operation changes threads at every
        # stage, and a generator that a server drives would leave its context in that thread.
        root = parent if parent is not None else Context()
        self._span = tracer.start_span(name, context=root, attributes=dict(attributes))
        self.context = set_span_in_context(self._span, root)

    def set_attributes(self, **attributes: Any) -> None:
        self._span.set_attributes(attributes)

    def headers(self) -> dict[str, str]:
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, context=self.context)
        return carrier

    def end(self, error: BaseException | None = None) -> None:
        if error is not None:
            self._span.record_exception(error)
            self._span.set_status(Status(StatusCode.ERROR, str(error)))
        self._span.end()


class _RareLog(logging.Filter):
    """Passes one record per interval.

    An unreachable collector would log three lines an export.
    """

    def __init__(self, quiet_s: float) -> None:
        super().__init__()
        self._quiet_s = quiet_s
        self._quiet_until = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        if record.created < self._quiet_until:
            return False
        self._quiet_until = record.created + self._quiet_s
        return True


class Telemetry(Instruments):
    """The metrics and spans of one process, and their export.

    Args:
        reader: Exports metrics; None: metrics are read by `snapshot` alone.
        tracer_provider: Records and exports spans; None: spans do nothing.
        resource: Attributes of this process in both exports.
        timing: Bounds the time that `close` takes.
    """

    def __init__(
        self,
        reader: PeriodicExportingMetricReader | None = None,
        tracer_provider: TracerProvider | None = None,
        resource: Resource | None = None,
        timing: ExportTiming = ExportTiming(),
    ) -> None:
        super().__init__([reader] if reader is not None else [], resource)
        self._exporter = reader
        self._timing = timing
        self._tracer_provider = tracer_provider
        self._tracer: Tracer | None = None
        if tracer_provider is not None:
            self._tracer = tracer_provider.get_tracer("fletcher", own_version())

    def span(self, name: str, parent: Span | Context | None = None, **attributes: Any) -> Span:
        """Start a span, for use in a `with` statement.

        Args:
            name: The operation: `do_put`, `tokenize`, `inference`, ...
            parent: The span that this one is part of, or the result of `extract`.
            attributes: Strings, numbers or booleans.
        """
        if self._tracer is None:
            return _NO_SPAN
        context = parent.context if isinstance(parent, Span) else parent
        return _RecordedSpan(self._tracer, name, context, attributes)

    def extract(self, headers: Mapping[str, str | bytes | Sequence[str | bytes]]) -> Context | None:
        """The trace in a caller's `traceparent` header; None if none is recorded.

        Args:
            headers: As Flight's middleware has them: lower-case names, lists of values.
        """
        if self._tracer is None or "traceparent" not in headers:
            return None
        carrier = {
            name: _first(headers[name]) for name in ("traceparent", "tracestate") if name in headers
        }
        return TraceContextTextMapPropagator().extract(carrier, context=Context())

    def close(self) -> None:
        """Export what is left and stop exporting; `snapshot` still works. Idempotent.

        Takes about twice the timeout at most if the collector does not answer.
        """
        self._tracer = None
        tracer_provider, self._tracer_provider = self._tracer_provider, None
        if tracer_provider is not None:
            tracer_provider.shutdown()
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            exporter.shutdown(timeout_millis=self._timing.timeout_s * 1000)


def configure(
    otlp_endpoint: str | None = None,
    *,
    timing: ExportTiming = ExportTiming(),
    **service: str,
) -> Telemetry:
    """Telemetry of this process, exported by OTLP if an endpoint is given.

    Args:
        otlp_endpoint: A collector's base address, `http://host:4318`; `/v1/traces` and
            `/v1/metrics` are appended. None: nothing is exported. OpenTelemetry's own variables
            `OTEL_EXPORTER_OTLP_HEADERS` and `OTEL_RESOURCE_ATTRIBUTES` apply; `OTEL_SDK_DISABLED`
            empties `snapshot` as well.
        timing: Intervals of the export.
        service: More resource attributes, as `service.<name>`.

    Raises:
        ConfigError: The endpoint is not an HTTP address, or the exporter is not installed.
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
        if not any(isinstance(one, _RareLog) for one in logger.filters):
            logger.addFilter(_RareLog(timing.quiet_s))
    base = otlp_endpoint.rstrip("/")
    resource = Resource.create(
        {"service.name": "fletcher", "service.version": own_version()}
        | {f"service.{name}": value for name, value in service.items()}
    )
    tracer_provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    tracer_provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(f"{base}/v1/traces", timeout=timing.timeout_s))
    )
    reader = PeriodicExportingMetricReader(
        OTLPMetricExporter(f"{base}/v1/metrics", timeout=timing.timeout_s),
        export_interval_millis=timing.interval_s * 1000,
    )
    return Telemetry(reader, tracer_provider, resource, timing)


def _first(value: str | bytes | Sequence[str | bytes]) -> str:
    one = value if isinstance(value, (str, bytes)) else value[0]
    return one.decode("ascii", "replace") if isinstance(one, bytes) else one
