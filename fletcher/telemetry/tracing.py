"""Metrics and traces of one process.

`Telemetry` holds the metrics. With an OTLP endpoint, metrics are exported and spans are recorded,
see `telemetry.otlp`. Without an endpoint, every span is the same object, which does nothing, and
neither the tracing SDK nor the exporter is imported.

    telemetry = configure("http://127.0.0.1:4318")
    telemetry.rows_received.add(500)
    with telemetry.span("do_put", parent=telemetry.extract(headers)) as call:
        with telemetry.stage_duration.time(stage="tokenize"):
            ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fletcher.errors import ConfigError
from fletcher.telemetry.metrics import Instruments

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from fletcher.telemetry.otlp import OtlpExport


@dataclass(frozen=True, slots=True)
class ExportTiming:
    """Intervals and time limits of the export."""

    interval_s: float = 10.0  # between two exports of metrics
    timeout_s: float = 5.0  # longest wait for an answer of the collector
    quiet_s: float = 300.0  # between two log lines about a failed export


class Span:
    """An operation in a trace, which starts when the span is created.

    This class records nothing. `telemetry.otlp` has a subclass that records.
    """

    context: Context | None = None

    def set_attributes(self, **attributes: Any) -> None:
        """Add attributes, whose values are strings, numbers or booleans."""

    def headers(self) -> dict[str, str]:
        """Headers to send with a call to another server, such as `traceparent`.

        Empty if nothing is recorded.
        """
        return {}

    def end(self, error: BaseException | None = None) -> None:
        """End the span; `error` marks it as failed.

        Needed only without a `with` statement, such as for a span that ends on another thread.
        """

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self.end(error)


_NO_SPAN = Span()


class Telemetry(Instruments):
    """The metrics and spans of one process. Without `export`, spans do nothing."""

    def __init__(self, export: OtlpExport | None = None, *, in_background: bool = False) -> None:
        readers, resource = ([export.reader], export.resource) if export else ([], None)
        super().__init__(readers, resource, in_background=in_background)
        self._export = export

    def span(self, name: str, parent: Span | Context | None = None, **attributes: Any) -> Span:
        """Start a span of an operation such as `tokenize`, for use in a `with` statement.

        `parent` is the span that the new span is part of, or the result of `extract`. Values of
        attributes are strings, numbers or booleans.
        """
        if self._export is None:
            return _NO_SPAN
        context = parent.context if isinstance(parent, Span) else parent
        return self._export.start_span(name, context, attributes)

    def extract(self, headers: Mapping[str, str | bytes | Sequence[str | bytes]]) -> Context | None:
        """The trace in a caller's `traceparent` header.

        Returns None if spans are not recorded or the header is missing. `headers` has the form that
        Flight's middleware gets: lower-case names and lists of values.
        """
        if self._export is None or "traceparent" not in headers:
            return None
        return self._export.extract(headers)

    def close(self) -> None:
        """Export the remaining data, and stop exporting. Idempotent.

        `snapshot` still works afterwards. If the collector does not answer, this takes at most
        about twice `ExportTiming.timeout_s`.
        """
        export, self._export = self._export, None
        if export is not None:
            self._reader.result()  # wait: the last export needs the instruments
            export.close()


def configure(
    otlp_endpoint: str | None = None, *, timing: ExportTiming = ExportTiming(), **service: str
) -> Telemetry:
    """Telemetry of this process, exported by OTLP if an endpoint is given.

    Args:
        otlp_endpoint: Base address of a collector, such as `http://host:4318`. `/v1/traces` and
            `/v1/metrics` are appended. None: nothing is exported. OpenTelemetry's variables
            `OTEL_EXPORTER_OTLP_HEADERS` and `OTEL_RESOURCE_ATTRIBUTES` apply. `OTEL_SDK_DISABLED`
            also makes `snapshot` empty.
        timing: Intervals and time limits of the export.
        service: Further resource attributes; `name=value` is exported as `service.name`.

    Raises:
        ConfigError: The endpoint is not an HTTP address, or the exporter is not installed.
    """
    if otlp_endpoint is None:
        return Telemetry(in_background=True)
    if not otlp_endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"`otlp_endpoint` is {otlp_endpoint!r}, expected a collector's address such as "
            "http://127.0.0.1:4318 (OTLP over HTTP)",
            field="otlp_endpoint",
        )
    from fletcher.telemetry.otlp import OtlpExport

    return Telemetry(OtlpExport(otlp_endpoint.rstrip("/"), timing, service))
