"""Fletcher's metrics: OpenTelemetry instruments, declared once in `Instruments`.

Every metric is read through readers of the SDK. `Instruments.snapshot`, for the `stats` action,
uses a reader in memory. `telemetry.otlp` attaches a reader that exports. More can be attached.

Counters and gauges keep their values in this module, and are observable instruments of the SDK. An
`add` of the SDK's own counter costs about seven times as much CPU time (measured with two
attributes and one reader), and more with each further reader. Histograms are the SDK's own, as
OpenTelemetry has no observable histograms. A micro-batch records about five values.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry import metrics as api
    from opentelemetry.sdk.metrics.export import (
        HistogramDataPoint,
        InMemoryMetricReader,
        MetricReader,
    )
    from opentelemetry.sdk.resources import Resource

Key = tuple[str, ...]

# Bounds of buckets in seconds, from 0.1 ms to 210 s. With four bounds per octave, a percentile is
# at most 19% wrong.
BOUNDS_S = tuple(0.0001 * 2 ** (step / 4) for step in range(85))
# Bounds for readers that export their data: one per octave.
EXPORTED_BOUNDS_S = BOUNDS_S[::4]


class _Instrument(ABC):
    """A metric with one value for each combination of label values.

    The unit is a UCUM code: `s`, `By`, `{row}`. Every call must give all labels. Label values come
    from small closed sets (stages, devices, error codes), never from a request.
    """

    empty: Any = 0  # the value without any data point

    def __init__(self, name: str, unit: str, text: str, *labels: str) -> None:
        self.name = f"fletcher.{name}"
        self.unit = unit
        self.text = text
        self.labels = labels
        self._entries: dict[Key, Any] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def register(self, meter: api.Meter) -> None:
        """Create the OpenTelemetry instrument. Called once."""

    def summarize(self, points: Sequence[Any]) -> Any:
        """Convert a reader's data points to a value for JSON.

        Returns:
            For an instrument without labels, its one value. Otherwise a dict of values, whose keys
            are label values joined by commas.
        """
        values = {
            tuple(point.attributes[label] for label in self.labels): self._value(point)
            for point in points
        }
        if not self.labels:
            return values.get((), self.empty)
        return {",".join(key): value for key, value in sorted(values.items())}

    def _value(self, point: Any) -> Any:
        return point.value

    def _key(self, attributes: Mapping[str, str]) -> Key:
        if len(attributes) == len(self.labels):
            try:
                return tuple([attributes[label] for label in self.labels])
            except KeyError:
                pass
        raise TypeError(f"{self.name} takes the labels {self.labels}, got {tuple(attributes)}")


class _Observable(_Instrument):
    """An instrument that returns its values when a reader asks for them."""

    @abstractmethod
    def values(self) -> dict[Key, float]:
        """Current values, by the values of the labels."""

    def _observe(self, _: api.CallbackOptions) -> list[api.Observation]:
        from opentelemetry.metrics import Observation

        return [
            Observation(value, dict(zip(self.labels, key, strict=True)))
            for key, value in self.values().items()
        ]


class Counter(_Observable):
    """A sum that never decreases. Thread-safe."""

    _entries: dict[Key, float]

    def register(self, meter: api.Meter) -> None:
        meter.create_observable_counter(self.name, [self._observe], self.unit, self.text)

    def add(self, amount: float = 1, **attributes: str) -> None:
        """Add `amount`, which must not be negative."""
        key = self._key(attributes)
        with self._lock:
            self._entries[key] = self._entries.get(key, 0) + amount

    def values(self) -> dict[Key, float]:
        with self._lock:
            return dict(self._entries)


class Gauge(_Observable):
    """A value returned by a callback at each reading, such as the depth of a queue."""

    empty = None

    _entries: dict[Key, Callable[[], float]]

    def register(self, meter: api.Meter) -> None:
        meter.create_observable_gauge(self.name, [self._observe], self.unit, self.text)

    def observe(self, callback: Callable[[], float], **attributes: str) -> Callable[[], None]:
        """Register `callback`, which returns the value for these labels.

        It replaces a callback with the same labels. `callback` may be called on any thread. It must
        not raise and must not block.

        Returns:
            A function that removes the callback, unless another callback has replaced it.
        """
        key = self._key(attributes)
        with self._lock:
            self._entries[key] = callback

        def remove() -> None:
            with self._lock:
                if self._entries.get(key) is callback:
                    del self._entries[key]

        return remove

    def values(self) -> dict[Key, float]:
        with self._lock:
            callbacks = dict(self._entries)
        # Callbacks are called without the lock, because a callback may use this instrument.
        return {key: callback() for key, callback in callbacks.items()}


class Histogram(_Instrument):
    """A distribution of durations in seconds. Thread-safe."""

    empty = dict.fromkeys(("count", "sum", "p50", "p95", "p99"), 0)
    registered: Future[Any]  # done when `_recorder` is set
    _recorder: api.Histogram | None = None

    def register(self, meter: api.Meter) -> None:
        self._recorder = meter.create_histogram(
            self.name, self.unit, self.text, explicit_bucket_boundaries_advisory=EXPORTED_BOUNDS_S
        )

    def record(self, seconds: float, **attributes: str) -> None:
        """Record one duration. The first call waits until the SDK is loaded."""
        self._key(attributes)
        if self._recorder is None:
            self.registered.result()
            assert self._recorder is not None
        self._recorder.record(seconds, attributes)

    @contextmanager
    def time(self, **attributes: str) -> Iterator[None]:
        """Record the duration of a `with` block, even if the block raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.record(time.perf_counter() - started, **attributes)

    def _value(self, point: HistogramDataPoint) -> dict[str, float]:
        percentiles = {f"p{one}": _percentile(point, one / 100) for one in (50, 95, 99)}
        return {"count": point.count, "sum": point.sum, **percentiles}


def _percentile(point: HistogramDataPoint, share: float) -> float:
    """Percentile, interpolated within its bucket and limited to recorded values."""
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


class Instruments:
    """All metrics of Fletcher, with the name, unit, meaning and labels of each.

    `resource` holds attributes of this process that `readers` export with the metrics. Importing
    the SDK takes 0.05 s of CPU time. With `in_background`, a thread imports it while the model is
    loaded.
    """

    def __init__(
        self,
        readers: Sequence[MetricReader] = (),
        resource: Resource | None = None,
        *,
        in_background: bool = False,
    ) -> None:
        self.rows_received = Counter("rows.received", "{row}", "Rows that clients sent")
        self.texts_received = Counter("texts.received", "{text}", "Texts that were tokenized")
        self.tokens_received = Counter("tokens.received", "{token}", "Tokens of these texts")
        self.bytes_received = Counter("bytes.received", "By", "Decoded bytes that clients sent")
        self.streams_open = Gauge("streams.open", "{stream}", "Open DoPut and DoExchange calls")
        self.pressure_grade = Gauge(
            "pressure.grade",
            "{grade}",
            "Load level: 0 normal, 1 moderate, 2 severe (new bulk calls are refused)",
        )
        self.pressure_time = Counter("pressure.time", "s", "Time spent at each load level", "grade")
        self.rows_stored = Counter("rows.stored", "{row}", "Rows that the store has")
        self.rows_failed = Counter("rows.failed", "{row}", "Rows that failed one by one")
        self.rows_deduplicated = Counter("rows.deduplicated", "{row}", "Rows dropped as duplicates")
        self.rows_reused = Counter(
            "rows.reused", "{row}", "Rows stored anew with the vector that the store had"
        )
        self.cache_hits = Counter("cache.hits", "{text}", "Texts found in the cache")
        self.cache_misses = Counter("cache.misses", "{text}", "Texts not found in the cache")
        self.cache_memory = Gauge("cache.memory", "By", "Size of the embedding cache")
        self.dedupe_index_memory = Gauge("known.memory", "By", "Memory of the dedupe indexes")
        device = ("model", "device")
        self.device_batches = Counter("device.batches", "{batch}", "Runs of the model", *device)
        self.device_tokens = Counter("device.tokens", "{token}", "Tokens computed", *device)
        self.device_padded_tokens = Counter(
            "device.padded_tokens", "{token}", "Tokens computed, padding included", *device
        )
        self.device_busy = Counter("device.busy", "s", "Time spent computing", *device)
        self.device_busy_share = Gauge(
            "device.busy_share", "1", "Share of the last 10 s that a device computed", *device
        )
        self.device_budget = Gauge(
            "device.budget", "{token}", "Padded tokens in a run; fewer once memory ran out", *device
        )
        self.device_rate = Gauge(
            "device.rate", "{token}/s", "Tokens computed in a second, through all layers", *device
        )
        self.queue_depth = Gauge("queue.depth", "{item}", "Items waiting for a stage", "stage")
        self.stage_duration = Histogram(
            "stage.duration", "s", "Time in tokenize, queue, inference, journal, append", "stage"
        )
        self.errors = Counter("errors", "{error}", "Calls and rows that failed", "code")
        worker = ("model", "worker")
        self.worker_restarts = Counter(
            "worker.restarts", "{restart}", "Worker processes restarted after they died", *worker
        )
        self.worker_states = Counter(
            "worker.states", "{change}", "Changes to each state of a worker", *worker, "state"
        )
        self.worker_usable = Gauge(
            "worker.usable", "1", "1 while a worker takes work, else 0", *worker
        )
        self.store_retries = Counter(
            "store.retries", "{retry}", "Appends to the store that were retried"
        )
        self.store_away = Gauge(
            "store.away", "1", "1 while a store is unavailable, else 0", "store"
        )
        self.store_append_share = Gauge(
            "store.pace", "1", "Append size as a share of the largest, 0 to 1", "store"
        )
        self._reader: Future[InMemoryMetricReader] = Future()
        self.stage_duration.registered = self._reader
        setup = threading.Thread(target=self._register, args=(readers, resource))
        setup.start()
        if not in_background:
            setup.join()

    def all(self) -> list[_Instrument]:
        """All instruments, in the order of their declaration."""
        return [one for one in vars(self).values() if isinstance(one, _Instrument)]

    def snapshot(self) -> dict[str, Any]:
        """Values of all instruments by name, ready for JSON.

        The value of a counter or gauge is a number. The value of a histogram is `{count, sum, p50,
        p95, p99}` in seconds, with approximate percentiles. An instrument with labels has a dict of
        such values by label values.
        """
        data = self._reader.result().get_metrics_data()
        points = {
            metric.name: metric.data.data_points
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }
        return {one.name: one.summarize(points.get(one.name, ())) for one in self.all()}

    def _register(self, readers: Sequence[MetricReader], resource: Resource | None) -> None:
        try:
            from opentelemetry.sdk import metrics as sdk
            from opentelemetry.sdk.metrics.export import InMemoryMetricReader
            from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation

            reader = InMemoryMetricReader(
                preferred_aggregation={sdk.Histogram: ExplicitBucketHistogramAggregation(BOUNDS_S)}
            )
            provider = sdk.MeterProvider([reader, *readers], resource, shutdown_on_exit=False)
            meter = provider.get_meter("fletcher", own_version())
            for one in self.all():
                one.register(meter)
            self._reader.set_result(reader)
        except BaseException as error:  # noqa: BLE001 - `result()` raises it on other threads
            self._reader.set_exception(error)


def own_version() -> str:
    """Installed version of Fletcher; "0" in a checkout that is not installed."""
    try:
        return version("longbow-fletcher")
    except PackageNotFoundError:
        return "0"
