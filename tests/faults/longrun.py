"""A long run of one server under full load and faults: rows, memory and latency."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from benchmarks import hardware
from fletcher.client import connect
from fletcher.errors import FletcherError
from fletcher.models.bundle.registry import DEFAULT_MODEL
from tests.faults.launching import Spawning
from tests.faults.ledger import Upload, entries
from tests.faults.plans import Event, Schedule
from tests.faults.schedules import Play
from tests.faults.stories import Story

_UPLOAD_ROWS = 10_000
_BATCH_ROWS = 200
_CLIENTS = 2
_SAMPLE_S = 5.0
_CHECK_S = 60.0
_PROBE_S = 0.1
_END_S = 600.0
# Start of a server's life: caches fill, and tables get their first compactions.
_WARM_S = 420.0
_FAULTS = ("kill a worker", "kill a client")
_SERVER_FAULTS = ("kill the server", "end the server")


def run(models: Path, folder: Path, minutes: float, out: Path) -> None:
    """Run, check that no row is lost or doubled, and write soak.json and soak.png.

    Args:
        models: Folder of bundles with the default model.
        folder: Working folder; must not exist.
        minutes: Time in which uploads are begun.
        out: Folder of the results; made if missing.

    Raises:
        AssertionError: A promise was broken.
    """
    import matplotlib as mpl  # noqa: F401 - fails now rather than in half an hour

    out.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(
        seed=0,
        store="lance",
        power=False,
        uploads=(),
        options={},
        constants={},
        transfer={"max_retries": 30},
        pause_s=0.0,
        events=(),
        model=DEFAULT_MODEL,
        backend="auto",
    )
    with Spawning() as launcher, Play(schedule, launcher, models, folder, Story()) as play:
        load = _Load(play, minutes * 60)
        load.run()
        result = load.result()
    (out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, out / "soak.png")
    for name in ("rows", "rows_per_s", "front_mb_per_hour", "latency_ms", "faults"):
        print(f"{name}: {result[name]}")
    print(f"written to {out}/soak.json and {out}/soak.png")


class _Load:
    """Clients that begin one upload after the other, faults, and measurements."""

    def __init__(self, play: Play, duration_s: float) -> None:
        self._play = play
        self._duration_s = duration_s
        self._began = time.monotonic()
        self._chance = random.Random(0)
        self._diaries: dict[int, Path] = {}
        self._samples: list[dict[str, float]] = []
        self._latencies: list[tuple[float, float]] = []
        self._faults: Counter[str] = Counter()
        self._ended = threading.Event()

    def run(self) -> None:
        """Play the whole run, and check the result."""
        probe = threading.Thread(target=self._probe)
        probe.start()
        try:
            self._drive()
        finally:
            self._ended.set()
            probe.join()
        self._play.finish()

    def _drive(self) -> None:
        next_sample = next_check = 0.0
        next_fault = 20.0
        while self._now < self._duration_s + _END_S:
            ending = self._now > self._duration_s
            self._feed(begin=not ending)
            if ending and not self._diaries:
                return
            if self._now > next_fault and not ending:
                next_fault = self._now + self._chance.uniform(10, 40)
                self._break()
            if self._now > next_check:
                self._play.ledger.check()
                next_check = self._now + _CHECK_S
            if self._now > next_sample:
                self._sample()
                next_sample = self._now + _SAMPLE_S
            time.sleep(0.2)
        raise AssertionError("the uploads do not come to their end")

    @property
    def _now(self) -> float:
        return time.monotonic() - self._began

    def _feed(self, *, begin: bool) -> None:
        """Keep some uploads going, each with a client until it is complete."""
        for number, diary in list(self._diaries.items()):
            upload = self._play.ledger.uploads[number]
            if self._play.clients[number][-1].alive:
                continue
            if any(entry.get("summary", {}).get("complete") for entry in entries(diary)):
                del self._diaries[number]
            else:
                self._diaries[number] = self._play.upload(upload, resume=True)
        while begin and len(self._diaries) < _CLIENTS:
            number = len(self._play.ledger.uploads)
            flawed = number % 4 == 0
            upload = Upload(
                number, f"d{number % 2}", _UPLOAD_ROWS, _BATCH_ROWS, "journal", flawed=flawed
            )
            self._play.ledger.uploads[number] = upload
            self._play.clients[number] = []
            self._diaries[number] = self._play.upload(upload)

    def _break(self) -> None:
        """Kill the server in the first half only, to see its memory grow afterwards."""
        kinds = _FAULTS + (_SERVER_FAULTS if self._now < self._duration_s / 2 else ())
        kind = self._chance.choice(kinds)
        self._faults[kind] += 1
        number = self._chance.choice([*self._diaries])
        self._play.happen(Event(0.0, kind, number), self._play.ledger.uploads[number])

    def _sample(self) -> None:
        ledger = self._play.ledger
        rows = sum(int(ledger.durable(upload).sum()) for upload in ledger.uploads.values())
        try:
            front = psutil.Process(self._play.server.pid)
            front_bytes = front.memory_info().rss
            children = front.children(recursive=True)
            all_bytes = front_bytes + sum(one.memory_info().rss for one in children)
        except psutil.NoSuchProcess:
            return
        self._samples.append(
            {
                "s": self._now,
                "rows": rows,
                "pid": self._play.server.pid,
                "front_mb": front_bytes / 1e6,
                "all_mb": all_bytes / 1e6,
            }
        )

    def _probe(self) -> None:
        """Embed one short text at a time, as a search does."""
        while not self._ended.is_set():
            try:
                with connect(self._play.address, timeout_s=5.0) as client:
                    while not self._ended.wait(_PROBE_S):
                        started = time.perf_counter()
                        client.embed(["which package plays music"])
                        ms = 1000 * (time.perf_counter() - started)
                        self._latencies.append((self._now, ms))
            except (FletcherError, pa.ArrowException):
                self._ended.wait(0.5)  # the server is being started again

    def result(self) -> dict[str, Any]:
        """All measurements."""
        last = self._samples[-1]
        return {
            "hardware": hardware.facts(),
            "versions": hardware.versions(),
            "minutes": self._now / 60,
            "rows": last["rows"],
            "rows_per_s": last["rows"] / last["s"],
            "given_up": self._play.ledger.num_given_up,
            "front_mb_per_hour": _slope(self._samples),
            "latency_ms": _percentiles([ms for _, ms in self._latencies]),
            "faults": dict(self._faults),
            "samples": self._samples,
            "latencies": self._latencies,
        }


def _slope(samples: list[dict[str, float]]) -> float | None:
    """Growth of the last server process once it was warm, in MB an hour."""
    mine = [one for one in samples if one["pid"] == samples[-1]["pid"]]
    warm = [one for one in mine if one["s"] >= mine[0]["s"] + _WARM_S]
    if len(warm) < 3:
        return None
    slope, _ = np.polyfit([one["s"] for one in warm], [one["front_mb"] for one in warm], 1)
    return float(slope * 3600)


def _percentiles(milliseconds: list[float]) -> dict[str, float]:
    if not milliseconds:
        return {}
    return {f"p{p}": float(np.percentile(milliseconds, p)) for p in (50, 99)}


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot rows a second, memory and latency over time."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    samples = result["samples"]
    minutes = np.array([one["s"] for one in samples]) / 60
    rows = np.array([one["rows"] for one in samples])
    figure, (speed, memory, latency) = plt.subplots(3, 1, sharex=True, figsize=(9, 9))
    speed.plot(minutes[1:], np.diff(rows) / np.diff(minutes * 60))
    speed.set_ylabel("durable rows/s")
    for name, label in (("front_mb", "front process"), ("all_mb", "with its workers")):
        memory.plot(minutes, [one[name] for one in samples], label=label)
    memory.set_ylabel("resident MB")
    memory.legend()
    by_minute: dict[int, list[float]] = {}
    for s, ms in result["latencies"]:
        by_minute.setdefault(int(s // 60), []).append(ms)
    for name in ("p50", "p99"):
        values = [_percentiles(one)[name] for one in by_minute.values()]
        latency.plot([minute + 0.5 for minute in by_minute], values, "o-", label=name)
    latency.set_ylabel("ms for one text")
    latency.set_yscale("log")
    latency.legend()
    latency.set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path)
