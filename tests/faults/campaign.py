"""Runs of many points of `tests.faults.injection`, several at once, which can be continued.

A campaign's folder keeps its points, one file per store, and a line per result. Points with a
result are left out when the campaign goes on. A broken promise is tried again with more patience,
because a busy machine is slow.
"""

from __future__ import annotations

import atexit
import json
import math
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.injection import Limits, Result, Run, run_point
from tests.faults.launching import Forking
from tests.faults.points import Point, build_preload

_PATIENT = Limits(call_s=60.0, settle_s=60.0)


class Campaign:
    """Points of some stores and their results.

    Args:
        folder: Keeps points and results; made if missing.
        models: Folder of bundles with the model `tiny`.
        work: Folder for the runs, in memory if possible.
        jobs: Number of runs at once.
    """

    def __init__(self, folder: Path, models: Path, work: Path, jobs: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._models = models
        self._work = work
        self._jobs = jobs
        self._preload = build_preload(work)
        self._results = folder / "results.jsonl"

    def points(self, stores: Sequence[str]) -> list[Point]:
        """All points; found by recording runs where the folder has none."""
        missing = [store for store in stores if not (self._folder / f"{store}.json").exists()]
        if missing:
            with Forking(self._preload) as launcher:
                for store in missing:
                    folder = self._work / f"recording-{store}"
                    recording = Run(store, None, launcher, self._models, folder).record()
                    launcher.end_all()
                    points = [asdict(one) for one in recording.points(store, launcher.sites)]
                    (self._folder / f"{store}.json").write_text(json.dumps(points, indent=0))
                    np.save(self._folder / f"{store}.npy", recording.vectors)
        found = []
        for store in stores:
            text = (self._folder / f"{store}.json").read_text()
            found += [Point(**one) for one in json.loads(text)]
        return found

    def done(self) -> dict[Point, Result]:
        """Results of earlier, by point: the last one of each."""
        results: dict[Point, Result] = {}
        for line in self._results.read_text().splitlines() if self._results.exists() else ():
            fields = json.loads(line)
            point = Point(**fields.pop("point"))
            results[point] = Result(point, **fields)
        return results

    def ordered(self, points: Sequence[Point]) -> list[Point]:
        """The points, those of call sites with the fewest results first."""
        shuffled = random.Random(0).sample(points, len(points))
        shuffled.sort(key=lambda one: one.how != "raise")
        seen = Counter((one.store, one.where) for one in self.done())
        ranks = {}
        for one in shuffled:
            ranks[one] = seen[one.store, one.where]
            seen[one.store, one.where] += 1
        return sorted(random.Random(1).sample(points, len(points)), key=ranks.__getitem__)

    def run(self, points: Sequence[Point], limit_s: float = math.inf) -> Iterator[Result]:
        """Run points in this order, and note each result; stop after `limit_s` seconds."""
        deadline = time.monotonic() + limit_s
        jobs = [
            (point, self._folder / f"{point.store}.npy", self._models, self._work, self._preload)
            for point in points
        ]
        # Spawned, because processes that fork servers must not be forks themselves.
        context = multiprocessing.get_context("spawn")
        with ExitStack() as stack:
            file = stack.enter_context(self._results.open("a"))
            pool = stack.enter_context(context.Pool(min(self._jobs, max(1, len(jobs)))))
            for result in pool.imap_unordered(_play, jobs):
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                yield result
                if time.monotonic() > deadline:
                    return  # this ends the runs in progress
            pool.close()
            pool.join()


def tenth(points: Sequence[Point], seed: int) -> list[Point]:
    """One point of each call site, of a tenth of the call sites."""
    rng = random.Random(seed)
    by_site: defaultdict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in points:
        by_site[point.store, point.where].append(point)
    return [rng.choice(by_site[site]) for site in rng.sample(sorted(by_site), len(by_site) // 10)]


def report(results: Iterator[Result], num_points: int) -> list[Result]:
    """Print broken promises and the counts; return the broken ones."""
    began = time.monotonic()
    counts: Counter[str] = Counter()
    broken = []
    for result in results:
        counts[result.status] += 1
        if result.status == "broken":
            broken.append(result)
            print(f"{result.point}\n    {result.detail}", flush=True)
        if counts.total() % 100 == 0:
            told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
            print(f"{counts.total()} of {num_points} points: {told}", flush=True)
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    print(f"{counts.total()} points: {told}; {time.monotonic() - began:.0f} s")
    return broken


_launchers: list[Forking] = []


def _play(job: tuple[Point, Path, Path, Path, Path]) -> Result:
    """Run one point in a process of the pool."""
    point, vectors, models, work, preload = job
    if not _launchers:
        os.setsid()  # the kernel shares the processors between sessions
        _launchers.append(Forking(preload))
        atexit.register(_launchers[0].close)
    arguments: Any = (point, np.load(vectors), _launchers[0], models)
    result = run_point(*arguments, Path(tempfile.mkdtemp(dir=work)) / "run", Limits())
    if result.status == "broken" and result.slow:
        return run_point(*arguments, Path(tempfile.mkdtemp(dir=work)) / "run", _PATIENT)
    return result
