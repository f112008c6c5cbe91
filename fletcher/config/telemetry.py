"""Options of logs, traces and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from fletcher.config.option import TEXT, OptionGroup, option


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig(OptionGroup):
    """Level and format of the log, and destination of traces and metrics.

    Attributes:
        log_level: Least severe level of log lines on standard error.
        log_format: Format of log lines: text for people, json for log collectors.
        otlp_endpoint: OTLP/HTTP URL that receives traces and metrics. Each call takes slightly
            longer.
    """

    log_level: str = option("info", TEXT, choices=("debug", "info", "warning", "error"))
    log_format: str = option("text", TEXT, choices=("text", "json"))
    otlp_endpoint: str | None = option(
        None, TEXT, pattern=r"https?://.+", expected="an http:// or https:// URL"
    )
