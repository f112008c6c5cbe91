"""Traces of callers, read from the `traceparent` header."""

from __future__ import annotations

from typing import Any

from pyarrow import flight

from fletcher.telemetry.tracing import Telemetry


class _Trace(flight.ServerMiddleware):  # type: ignore[misc]
    def __init__(self, trace: Any) -> None:
        super().__init__()
        self.trace = trace


class TraceFactory(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Middleware that keeps each call's trace for its handler.

    gRPC's own instrumentation does not cover pyarrow.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        super().__init__()
        self._telemetry = telemetry

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> _Trace | None:
        """The trace named in the headers, if traces are recorded."""
        trace = self._telemetry.extract(headers)
        return None if trace is None else _Trace(trace)


def caller_trace(context: Any) -> Any:
    """The call's trace as `Telemetry.extract` returned it; None without one."""
    middleware = context.get_middleware("trace")
    return None if middleware is None else middleware.trace
