"""Metrics and traces of one process.

`Telemetry` holds the metrics. With an OTLP endpoint they are exported and spans are recorded, see
`telemetry.otlp`. Without one a span is a shared object that does nothing, and neither the tracing
SDK nor the exporter is imported.

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
    """Intervals of the export."""

    interval_s: float = 10.0  # between two exports of metrics
    timeout_s: float = 5.0  # longest wait for the collector's answer
    quiet_s: float = 300.0  # between two log lines about a collector that does not answer


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


class Telemetry(Instruments):
    """The metrics and spans of one process; without an export spans do nothing."""

    def __init__(self, export: OtlpExport | None = None, *, in_background: bool = False) -> None:
        readers, resource = ([export.reader], export.resource) if export else ([], None)
        super().__init__(readers, resource, in_background=in_background)
        self._export = export

    def span(self, name: str, parent: Span | Context | None = None, **attributes: Any) -> Span:
        """Start a span of an operation such as `tokenize`, for use in a `with` statement.

        `parent` is the span that this one is part of, or the result of `extract`. Attributes are
        strings, numbers or booleans.
        """
        if self._export is None:
            return _NO_SPAN
        context = parent.context if isinstance(parent, Span) else parent
        return self._export.start_span(name, context, attributes)

    def extract(self, headers: Mapping[str, str | bytes | Sequence[str | bytes]]) -> Context | None:
        """The trace in a caller's `traceparent` header; None if spans are not recorded.

        Headers are as Flight's middleware has them: lower-case names, lists of values.
        """
        if self._export is None or "traceparent" not in headers:
            return None
        return self._export.extract(headers)

    def close(self) -> None:
        """Export what is left and stop exporting; `snapshot` still works. Idempotent.

        Takes about twice the timeout at most if the collector does not answer.
        """
        export, self._export = self._export, None
        if export is not None:
            self._reader.result()  # the last export needs the instruments
            export.close()


def configure(
    otlp_endpoint: str | None = None, *, timing: ExportTiming = ExportTiming(), **service: str
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
        return Telemetry(in_background=True)
    if not otlp_endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"`otlp_endpoint` is {otlp_endpoint!r}, expected a collector's address such as "
            "http://127.0.0.1:4318 (OTLP over HTTP)",
            field="otlp_endpoint",
        )
    from fletcher.telemetry.otlp import OtlpExport

    return Telemetry(OtlpExport(otlp_endpoint.rstrip("/"), timing, service))
