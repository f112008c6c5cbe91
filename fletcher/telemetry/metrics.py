"""Every number that a running Fletcher keeps about itself, defined once, in `Instruments`.

Values are added up here, in this process, for the price of a lock and a dictionary entry.
`Instruments.snapshot` reads them for the `stats` action; `telemetry.tracing` exports the same
objects where an endpoint is configured, by observing them, so that counting costs no more then.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Key = tuple[str, ...]

# Seconds, from 0.1 ms to 210 s, four bounds an octave: a percentile is within 19% of the truth.
BOUNDS_S = tuple(0.0001 * 2 ** (step / 4) for step in range(85))


class _Instrument:
    """A named value per combination of labels.

    Args:
        name: Without the leading `fletcher.`.
        unit: UCUM, as OpenTelemetry wants it: `s`, `By`, `{row}`.
        text: What it counts, for people.
        labels: Attribute names, all of them required at every call. Values come from small closed
            sets (stages, devices, error codes), never from a request.
    """

    def __init__(self, name: str, unit: str, text: str, *labels: str) -> None:
        self.name = f"fletcher.{name}"
        self.unit = unit
        self.text = text
        self.labels = labels
        self._lock = threading.Lock()

    def _key(self, attributes: Mapping[str, str]) -> Key:
        if len(attributes) == len(self.labels):
            try:
                return tuple([attributes[label] for label in self.labels])
            except KeyError:
                pass
        raise TypeError(f"{self.name} takes the labels {self.labels}, got {tuple(attributes)}")

    def attributes(self, key: Key) -> dict[str, str]:
        """The attributes that a key of `values` stands for."""
        return dict(zip(self.labels, key, strict=True))

    def _by_label(self, values: Mapping[Key, Any], nothing: Any) -> Any:
        """The one value of an instrument without labels; else values by label, joined by commas."""
        if not self.labels:
            return values.get((), nothing)
        return {",".join(key): value for key, value in sorted(values.items())}


class Counter(_Instrument):
    """A sum that only grows. Thread-safe."""

    def __init__(self, name: str, unit: str, text: str, *labels: str) -> None:
        super().__init__(name, unit, text, *labels)
        self._values: dict[Key, float] = {}

    def add(self, amount: float = 1, **attributes: str) -> None:
        """Adds `amount`, which is not negative."""
        key = self._key(attributes)
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def snapshot(self) -> Any:
        """The sum, or sums by label."""
        return self._by_label(self.values(), 0)

    def values(self) -> dict[Key, float]:
        """Sums by label values."""
        with self._lock:
            return dict(self._values)


class Gauge(_Instrument):
    """A value that is asked for when somebody looks: a queue's depth, the open streams."""

    def __init__(self, name: str, unit: str, text: str, *labels: str) -> None:
        super().__init__(name, unit, text, *labels)
        self._watched: dict[Key, Callable[[], float]] = {}

    def watch(self, read: Callable[[], float], **attributes: str) -> Callable[[], None]:
        """Asks `read` from now on, in place of an earlier one with the same labels.

        `read` is called from any thread, must not raise and must not block.

        Returns:
            What ends it, unless another came in its place.
        """
        key = self._key(attributes)
        with self._lock:
            self._watched[key] = read

        def end() -> None:
            with self._lock:
                if self._watched.get(key) is read:
                    del self._watched[key]

        return end

    def snapshot(self) -> Any:
        """The value, or values by label; None where an unlabelled gauge watches nothing."""
        return self._by_label(self.values(), None)

    def values(self) -> dict[Key, float]:
        """Values by label values, asked for now."""
        with self._lock:
            watched = dict(self._watched)
        return {key: read() for key, read in watched.items()}  # unlocked: `read` may count too


class _Distribution:
    """Recorded seconds of one combination of labels, in buckets."""

    __slots__ = ("buckets", "count", "highest", "lowest", "total")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS_S) + 1)
        self.count = 0
        self.total = 0.0
        self.lowest = float("inf")
        self.highest = 0.0

    def percentile(self, share: float) -> float:
        """Interpolated within its bucket; never outside what was recorded."""
        rank = share * self.count
        below = 0
        for index, num in enumerate(self.buckets):
            if num and below + num >= rank:
                left = BOUNDS_S[index - 1] if index else 0.0
                right = BOUNDS_S[index] if index < len(BOUNDS_S) else self.highest
                value = left + (right - left) * (rank - below) / num
                return min(max(value, self.lowest), self.highest)
            below += num
        return self.highest

    def summary(self) -> dict[str, float]:
        return {
            "count": self.count,
            "sum": self.total,
            "p50": self.percentile(0.50),
            "p95": self.percentile(0.95),
            "p99": self.percentile(0.99),
        }


class Histogram(_Instrument):
    """How long something took, in seconds. Thread-safe."""

    def __init__(self, name: str, text: str, *labels: str) -> None:
        super().__init__(name, "s", text, *labels)
        self._distributions: dict[Key, _Distribution] = {}
        self._exported: Callable[[float, dict[str, str]], None] | None = None

    def record(self, seconds: float, **attributes: str) -> None:
        key = self._key(attributes)
        bucket = bisect_left(BOUNDS_S, seconds)
        with self._lock:
            one = self._distributions.get(key)
            if one is None:
                one = self._distributions[key] = _Distribution()
            one.buckets[bucket] += 1
            one.count += 1
            one.total += seconds
            one.lowest = min(one.lowest, seconds)
            one.highest = max(one.highest, seconds)
        # OpenTelemetry can observe sums but no distributions: these are recorded twice.
        if self._exported is not None:
            self._exported(seconds, attributes)

    @contextmanager
    def time(self, **attributes: str) -> Iterator[None]:
        """Records how long the body took, also where it raised."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.record(time.perf_counter() - started, **attributes)

    def snapshot(self) -> Any:
        """`{count, sum, p50, p95, p99}` in seconds, or one of these by label."""
        with self._lock:
            summaries = {key: one.summary() for key, one in self._distributions.items()}
        return self._by_label(summaries, _Distribution().summary())

    def export_to(self, record: Callable[[float, dict[str, str]], None]) -> None:
        """From now on gives every record's seconds and attributes to `record`, too."""
        self._exported = record


class Instruments:
    """Every instrument of Fletcher: its name, unit, meaning and labels."""

    def __init__(self) -> None:
        self.rows_received = Counter("rows.received", "{row}", "Rows that clients sent")
        self.texts_received = Counter("texts.received", "{text}", "Texts given to tokenization")
        self.tokens_received = Counter("tokens.received", "{token}", "Tokens of these texts")
        self.bytes_received = Counter("bytes.received", "By", "Decoded bytes that clients sent")
        self.streams_open = Gauge("streams.open", "{stream}", "DoPut and DoExchange calls now open")
        self.pressure_grade = Gauge(
            "pressure.grade", "{grade}", "0 normal, 1 moderate, 2 severe: new bulk is refused"
        )
        self.pressure_time = Counter("pressure.time", "s", "Time spent in each grade", "grade")
        self.rows_stored = Counter("rows.stored", "{row}", "Rows that the store has taken")
        self.rows_failed = Counter("rows.failed", "{row}", "Rows refused one by one")
        self.rows_deduplicated = Counter(
            "rows.deduplicated", "{row}", "Rows not stored because they were there already"
        )
        self.cache_hits = Counter("cache.hits", "{text}", "Texts whose vector was in the cache")
        self.cache_misses = Counter("cache.misses", "{text}", "Texts that had to be embedded")
        self.cache_memory = Gauge("cache.memory", "By", "Size of the embedding cache")
        self.dedupe_index_memory = Gauge(
            "known.memory", "By", "Memory of what is known of datasets' rows, to drop duplicates"
        )
        self.device_batches = Counter(
            "device.batches", "{batch}", "Runs of the model", "model", "device"
        )
        self.device_tokens = Counter(
            "device.tokens", "{token}", "Tokens computed", "model", "device"
        )
        self.device_padded_tokens = Counter(
            "device.padded_tokens",
            "{token}",
            "Tokens computed, padding included",
            "model",
            "device",
        )
        self.device_busy = Counter("device.busy", "s", "Time spent computing", "model", "device")
        self.device_busy_share = Gauge(
            "device.busy_share",
            "1",
            "Share of the last 10 s that a device computed",
            "model",
            "device",
        )
        self.device_budget = Gauge(
            "device.budget",
            "{token}",
            "Padded tokens in one run; less after a device was out of memory",
            "model",
            "device",
        )
        self.device_rate = Gauge(
            "device.rate",
            "{token}/s",
            "Tokens that a device takes through all layers in a second",
            "model",
            "device",
        )
        self.queue_depth = Gauge("queue.depth", "{item}", "Items waiting for a stage", "stage")
        self.stage_duration = Histogram(
            "stage.duration",
            "Time in a stage: tokenize, queue, inference, journal, append",
            "stage",
        )
        self.errors = Counter("errors", "{error}", "Calls and rows that failed", "code")
        self.worker_restarts = Counter(
            "worker.restarts",
            "{restart}",
            "Processes started again after they died",
            "model",
            "worker",
        )
        self.worker_states = Counter(
            "worker.states",
            "{change}",
            "Changes of a worker's state, by the new one",
            "model",
            "worker",
            "state",
        )
        self.worker_usable = Gauge(
            "worker.usable", "1", "1 while a worker takes work, else 0", "model", "worker"
        )
        self.store_retries = Counter("store.retries", "{retry}", "Appends to the store tried again")
        self.store_away = Gauge("store.away", "1", "1 while a store is away, else 0", "store")
        self.store_pace = Gauge(
            "store.pace", "1", "Share of a full append that a store bears, 0 to 1", "store"
        )

    def all(self) -> list[Counter | Gauge | Histogram]:
        """Every instrument, in the order of definition."""
        kinds = (Counter, Gauge, Histogram)
        return [one for one in vars(self).values() if isinstance(one, kinds)]

    def snapshot(self) -> dict[str, Any]:
        """Every instrument's value by its name, ready for JSON.

        A number; for labelled instruments a number by label; for histograms `{count, sum, p50, p95,
        p99}`, the percentiles approximate.
        """
        return {one.name: one.snapshot() for one in self.all()}
