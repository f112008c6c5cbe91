"""Export of metrics and traces by OTLP. Imported only if an endpoint is set."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from fletcher.errors import ConfigError
from fletcher.telemetry.metrics import own_version
from fletcher.telemetry.tracing import ExportTiming, Span


class OtlpExport:
    """Exports metrics and traces to the collector at `base`, on threads of the SDK.

    Attributes:
        reader: Reader that exports the metrics of the MeterProvider that it is attached to.
        resource: Attributes of this process, which are exported with metrics and traces.

    Raises:
        ConfigError: The exporter is not installed.
    """

    def __init__(self, base: str, timing: ExportTiming, service: Mapping[str, str]) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"`otlp_endpoint` is set, but {error.name} is not installed; "
                "pip install 'longbow-fletcher[otlp]'",
                field="otlp_endpoint",
            ) from error
        for exporter in (OTLPMetricExporter, OTLPSpanExporter):
            logger = logging.getLogger(exporter.__module__)
            if not any(isinstance(one, _RareLog) for one in logger.filters):
                logger.addFilter(_RareLog(timing.quiet_s))
        self.resource = Resource.create(
            {"service.name": "fletcher", "service.version": own_version()}
            | {f"service.{name}": value for name, value in service.items()}
        )
        self.reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(f"{base}/v1/metrics", timeout=timing.timeout_s),
            export_interval_millis=timing.interval_s * 1000,
        )
        self._timeout_s = timing.timeout_s
        self._spans = TracerProvider(resource=self.resource, shutdown_on_exit=False)
        self._spans.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(f"{base}/v1/traces", timeout=timing.timeout_s))
        )
        self._tracer = self._spans.get_tracer("fletcher", own_version())

    def start_span(self, name: str, parent: Context | None, attributes: Mapping[str, Any]) -> Span:
        return _RecordedSpan(self._tracer, name, parent, attributes)

    def extract(self, headers: Mapping[str, str | bytes | Sequence[str | bytes]]) -> Context:
        """The trace in a caller's `traceparent` and `tracestate` headers."""
        names = ("traceparent", "tracestate")
        carrier = {name: _first(headers[name]) for name in names if name in headers}
        return TraceContextTextMapPropagator().extract(carrier, context=Context())

    def close(self) -> None:
        """Export the remaining data. Takes at most about twice the timeout."""
        self._spans.shutdown()
        self.reader.shutdown(timeout_millis=self._timeout_s * 1000)


class _RecordedSpan(Span):
    def __init__(
        self, tracer: Tracer, name: str, parent: Context | None, attributes: Mapping[str, Any]
    ) -> None:
        # The parent is passed explicitly, because the thread's context would be wrong. An operation
        # changes threads at every stage. A generator that a server iterates would leave its context
        # in the server's thread.
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
    """Log filter that lets one record pass per `quiet_s` seconds.

    Without it, each export to an unreachable collector would log three lines.
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


def _first(value: str | bytes | Sequence[str | bytes]) -> str:
    one = value if isinstance(value, (str, bytes)) else value[0]
    return one.decode("ascii", "replace") if isinstance(one, bytes) else one
