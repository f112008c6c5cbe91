"""Fletcher's metrics: OpenTelemetry instruments, declared once in `Instruments`.

Every metric is read through the SDK's readers: `Instruments.snapshot` has one in memory for the
`stats` action, and `telemetry.tracing` attaches one that exports by OTLP. More can be attached.

Counters and gauges are observable instruments over values that are kept here, because an `add` of
the SDK's own counter costs about seven times as much CPU time (measured with two attributes and one
reader), and each further reader adds to that. Histograms are the SDK's own, as OpenTelemetry has no
observable ones; a micro-batch records about five values.
"""

# ruff: noqa: RUF009 - the declarations call `field`

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

from opentelemetry import metrics as api
from opentelemetry.sdk.metrics import Histogram as SdkHistogram
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    HistogramDataPoint,
    InMemoryMetricReader,
    MetricReader,
    NumberDataPoint,
)
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation
from opentelemetry.sdk.resources import Resource

Key = tuple[str, ...]

# Seconds, from 0.1 ms to 210 s, four bounds an octave: a percentile is within 19% of the truth.
BOUNDS_S = tuple(0.0001 * 2 ** (step / 4) for step in range(85))
# Readers that send their data elsewhere get one bound an octave.
EXPORTED_BOUNDS_S = BOUNDS_S[::4]


class _Instrument(ABC):
    """A named value per combination of labels.

    Args:
        name: Without the leading `fletcher.`.
        unit: UCUM, as OpenTelemetry wants it: `s`, `By`, `{row}`.
        text: Description for people.
        labels: Attribute names, all required at every call. Their values come from small closed
            sets (stages, devices, error codes), never from a request.
    """

    def __init__(self, name: str, unit: str, text: str, *labels: str) -> None:
        self.name = f"fletcher.{name}"
        self.unit = unit
        self.text = text
        self.labels = labels
        self._lock = threading.Lock()

    @abstractmethod
    def register(self, meter: api.Meter) -> None:
        """Create the OpenTelemetry instrument. Called once, before the first value."""

    def summarize(self, points: Sequence[Any]) -> Any:
        """A reader's data points, ready for JSON.

        Returns:
            The one value of an instrument without labels; else values by label, joined by commas.
        """
        values = {
            tuple(point.attributes[label] for label in self.labels): self._value(point)
            for point in points
        }
        if not self.labels:
            return values.get((), self._value(None))
        return {",".join(key): value for key, value in sorted(values.items())}

    @abstractmethod
    def _value(self, point: Any) -> Any:
        """A data point's value; of None, the value before the first point."""

    def _key(self, attributes: Mapping[str, str]) -> Key:
        if len(attributes) == len(self.labels):
            try:
                return tuple([attributes[label] for label in self.labels])
            except KeyError:
                pass
        raise TypeError(f"{self.name} takes the labels {self.labels}, got {tuple(attributes)}")


class _Observable(_Instrument):
    """An instrument whose values a reader asks for."""

    @abstractmethod
    def values(self) -> dict[Key, float]:
        """Current values by label values."""

    def _observe(self, _: api.CallbackOptions) -> list[api.Observation]:
        return [
            api.Observation(value, dict(zip(self.labels, key, strict=True)))
            for key, value in self.values().items()
        ]


class Counter(_Observable):
    """A sum that only grows. Thread-safe."""

    def __init__(self, name: str, unit: str, text: str, *labels: str) -> None:
        super().__init__(name, unit, text, *labels)
        self._values: dict[Key, float] = {}

    def register(self, meter: api.Meter) -> None:
        """See `_Instrument.register`."""
        meter.create_observable_counter(self.name, [self._observe], self.unit, self.text)

    def add(self, amount: float = 1, **attributes: str) -> None:
        """Add `amount`, which is not negative."""
        key = self._key(attributes)
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def values(self) -> dict[Key, float]:
        """Sums by label values."""
        with self._lock:
            return dict(self._values)

    def _value(self, point: NumberDataPoint | None) -> float:
        return 0 if point is None else point.value


class Gauge(_Observable):
    """A value that is asked for when it is read: a queue's depth, the open streams."""

    def __init__(self, name: str, unit: str, text: str, *labels: str) -> None:
        super().__init__(name, unit, text, *labels)
        self._callbacks: dict[Key, Callable[[], float]] = {}

    def register(self, meter: api.Meter) -> None:
        """See `_Instrument.register`."""
        meter.create_observable_gauge(self.name, [self._observe], self.unit, self.text)

    def observe(self, callback: Callable[[], float], **attributes: str) -> Callable[[], None]:
        """Ask `callback` for the value; it replaces one with the same labels.

        `callback` is called from any thread; it must not raise and must not block.

        Returns:
            A function that removes the callback, unless another has taken its place.
        """
        key = self._key(attributes)
        with self._lock:
            self._callbacks[key] = callback

        def remove() -> None:
            with self._lock:
                if self._callbacks.get(key) is callback:
                    del self._callbacks[key]

        return remove

    def values(self) -> dict[Key, float]:
        """Values by label values, asked for now."""
        with self._lock:
            callbacks = dict(self._callbacks)
        # Outside the lock: a callback may count too.
        return {key: callback() for key, callback in callbacks.items()}

    def _value(self, point: NumberDataPoint | None) -> float | None:
        return None if point is None else point.value


class Histogram(_Instrument):
    """A distribution of durations in seconds. Thread-safe."""

    _recorder: api.Histogram

    def register(self, meter: api.Meter) -> None:
        """See `_Instrument.register`."""
        self._recorder = meter.create_histogram(
            self.name,
            self.unit,
            self.text,
            explicit_bucket_boundaries_advisory=EXPORTED_BOUNDS_S,
        )

    def record(self, seconds: float, **attributes: str) -> None:
        """Record one duration."""
        self._key(attributes)
        self._recorder.record(seconds, attributes)

    @contextmanager
    def time(self, **attributes: str) -> Iterator[None]:
        """Record the duration of the block, also if it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.record(time.perf_counter() - started, **attributes)

    def _value(self, point: HistogramDataPoint | None) -> dict[str, float]:
        if point is None:
            return dict.fromkeys(("count", "sum", "p50", "p95", "p99"), 0)
        return {
            "count": point.count,
            "sum": point.sum,
            **{f"p{percent}": _percentile(point, percent / 100) for percent in (50, 95, 99)},
        }


def _percentile(point: HistogramDataPoint, share: float) -> float:
    """A percentile, interpolated within its bucket; never outside the recorded values."""
    rank = share * point.count
    below = 0
    for num, (left, right) in zip(
        point.bucket_counts, pairwise([0.0, *point.explicit_bounds, point.max]), strict=True
    ):
        if num and below + num >= rank:
            value = left + (right - left) * (rank - below) / num
            return min(max(value, point.min), point.max)
        below += num
    return point.max


def _declare(kind: type[_Instrument], name: str, unit: str, text: str, *labels: str) -> Any:
    return field(init=False, default_factory=lambda: kind(name, unit, text, *labels))


_counter = partial(_declare, Counter)
_gauge = partial(_declare, Gauge)
_histogram = partial(_declare, Histogram)


@dataclass(eq=False)
class Instruments:
    """All metrics of Fletcher: name, unit, meaning and labels of each.

    Args:
        readers: Readers beside the one in memory, such as an exporter's.
        resource: Attributes of this process, for the other readers.
    """

    readers: InitVar[Sequence[MetricReader]] = ()
    resource: InitVar[Resource | None] = None

    rows_received: Counter = _counter("rows.received", "{row}", "Rows that clients sent")
    texts_received: Counter = _counter("texts.received", "{text}", "Texts that were tokenized")
    tokens_received: Counter = _counter("tokens.received", "{token}", "Tokens of these texts")
    bytes_received: Counter = _counter("bytes.received", "By", "Decoded bytes that clients sent")
    streams_open: Gauge = _gauge("streams.open", "{stream}", "Open DoPut and DoExchange calls")
    pressure_grade: Gauge = _gauge(
        "pressure.grade",
        "{grade}",
        "Load level: 0 normal, 1 moderate, 2 severe (new bulk calls are refused)",
    )
    pressure_time: Counter = _counter(
        "pressure.time", "s", "Time spent at each load level", "grade"
    )
    rows_stored: Counter = _counter("rows.stored", "{row}", "Rows that the store has")
    rows_failed: Counter = _counter("rows.failed", "{row}", "Rows that failed one by one")
    rows_deduplicated: Counter = _counter(
        "rows.deduplicated", "{row}", "Rows dropped as duplicates"
    )
    cache_hits: Counter = _counter("cache.hits", "{text}", "Texts found in the cache")
    cache_misses: Counter = _counter("cache.misses", "{text}", "Texts not found in the cache")
    cache_memory: Gauge = _gauge("cache.memory", "By", "Size of the embedding cache")
    dedupe_index_memory: Gauge = _gauge("known.memory", "By", "Memory of the dedupe indexes")
    device_batches: Counter = _counter(
        "device.batches", "{batch}", "Runs of the model", "model", "device"
    )
    device_tokens: Counter = _counter(
        "device.tokens", "{token}", "Tokens computed", "model", "device"
    )
    device_padded_tokens: Counter = _counter(
        "device.padded_tokens", "{token}", "Tokens computed, padding included", "model", "device"
    )
    device_busy: Counter = _counter("device.busy", "s", "Time spent computing", "model", "device")
    device_busy_share: Gauge = _gauge(
        "device.busy_share", "1", "Share of the last 10 s that a device computed", "model", "device"
    )
    device_budget: Gauge = _gauge(
        "device.budget",
        "{token}",
        "Padded tokens in one run; less after a device was out of memory",
        "model",
        "device",
    )
    device_rate: Gauge = _gauge(
        "device.rate",
        "{token}/s",
        "Tokens that a device computes in a second, through all layers",
        "model",
        "device",
    )
    queue_depth: Gauge = _gauge("queue.depth", "{item}", "Items waiting for a stage", "stage")
    stage_duration: Histogram = _histogram(
        "stage.duration",
        "s",
        "Time in a stage: tokenize, queue, inference, journal, append",
        "stage",
    )
    errors: Counter = _counter("errors", "{error}", "Calls and rows that failed", "code")
    worker_restarts: Counter = _counter(
        "worker.restarts",
        "{restart}",
        "Worker processes started again after they died",
        "model",
        "worker",
    )
    worker_states: Counter = _counter(
        "worker.states",
        "{change}",
        "Changes of a worker's state, by the new state",
        "model",
        "worker",
        "state",
    )
    worker_usable: Gauge = _gauge(
        "worker.usable", "1", "1 while a worker takes work, else 0", "model", "worker"
    )
    store_retries: Counter = _counter(
        "store.retries", "{retry}", "Appends to the store that were retried"
    )
    store_away: Gauge = _gauge("store.away", "1", "1 while a store is unavailable, else 0", "store")
    store_append_share: Gauge = _gauge(
        "store.pace", "1", "Append size as a share of the largest, 0 to 1", "store"
    )

    def __post_init__(self, readers: Sequence[MetricReader], resource: Resource | None) -> None:
        self._reader = InMemoryMetricReader(
            preferred_aggregation={SdkHistogram: ExplicitBucketHistogramAggregation(BOUNDS_S)}
        )
        provider = MeterProvider([self._reader, *readers], resource, shutdown_on_exit=False)
        meter = provider.get_meter("fletcher", own_version())
        for one in self.all():
            one.register(meter)

    def all(self) -> list[_Instrument]:
        """Every instrument, in the order of declaration."""
        return [one for one in vars(self).values() if isinstance(one, _Instrument)]

    def snapshot(self) -> dict[str, Any]:
        """Every instrument's value by its name, ready for JSON.

        A number; for labelled instruments a number by label; for histograms `{count, sum, p50, p95,
        p99}` in seconds, the percentiles approximate.
        """
        data = self._reader.get_metrics_data()
        points = {
            metric.name: metric.data.data_points
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }
        return {one.name: one.summarize(points.get(one.name, ())) for one in self.all()}


def own_version() -> str:
    """The installed version of Fletcher; 0 in a checkout that is not installed."""
    try:
        return version("longbow-fletcher")
    except PackageNotFoundError:
        return "0"
