"""Ingests and uploads into a Longbow that is killed and stopped while they run.

A seed gives the plan. In the end each row is stored once, without any step by the user, and rows
that were reported as stored or durable are not lost when Longbow is killed after the report.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.doubles.proxy import Proxy
from tests.faults.launching import Launcher, Process
from tests.faults.ledger import MAX_ROW_BYTES, Ledger, Upload, entries
from tests.faults.longbow_servers import LongbowServer
from tests.faults.schedules import free_port
from tests.faults.stories import Story, told
from tests.integration.processes import eventually

_KINDS = {
    "kill longbow": 4,
    "kill longbow after an answer": 4,
    "stop longbow": 2,
    "kill fletcher": 2,
    "kill both": 2,
}
_LAST_STOP_S = 180.0  # most that a run takes after its last fault, beside its rows
_RETRYABLE = {"store_unavailable", "overloaded", "unavailable"}


# Sizes of runs into a real server and into the stand-in.
REAL: dict[str, Any] = {
    "num_rows": 20_000,
    "seconds": 10.0,
    "stops_s": (20.0, 75.0),
    "aways_s": (0.0, 0.0, 0.5, 3.0),
}
SMALL: dict[str, Any] = {
    "num_rows": 300,
    "seconds": 0.5,
    "stops_s": (2.0,),
    "aways_s": (0.0, 0.0, 0.3),
}


@dataclass(frozen=True)
class Fault:
    """A fault, `pause_s` after the last one; Longbow is away for `away_s`."""

    kind: str
    pause_s: float
    away_s: float


@dataclass(frozen=True)
class Plan:
    """One run: its rows, its faults and what sends the rows.

    Attributes:
        seed: Drew it.
        way: `ingest` is the command, `serve` a server with an upload by a client.
        upload: The rows.
        seconds: About how long the rows take without a fault.
        faults: In order.
        store_timeout: The server's option.
    """

    seed: int
    way: str
    upload: Upload
    seconds: float
    faults: tuple[Fault, ...]
    store_timeout: str


@dataclass
class Report:
    """Counts of one run.

    Attributes:
        faults: By kind.
        num_rows: Rows of the run.
        num_torn: How often Longbow did not start again because of its own files.
        num_steps: How often the user runs the command again.
        seconds: Time until all rows were reported as stored.
    """

    faults: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0
    num_torn: int = 0
    num_steps: int = 0
    seconds: float = 0.0

    @property
    def counts(self) -> Counter[str]:
        """All that is counted over many runs."""
        torn = {"torn, and run again": self.num_steps, "torn": self.num_torn}
        return self.faults + Counter(torn)


def draw(
    seed: int,
    *,
    num_rows: int,
    seconds: float,
    stops_s: tuple[float, ...],
    aways_s: tuple[float, ...],
) -> Plan:
    """The plan of a seed.

    Args:
        seed: Any number.
        num_rows: Rows to store.
        seconds: About how long they take without a fault.
        stops_s: How long Longbow may be stopped.
        aways_s: How long it may be away after it was killed.
    """
    chance = random.Random(f"{seed} longbow")
    way = chance.choice(["ingest", "serve"])
    kinds = chance.choices(list(_KINDS), list(_KINDS.values()), k=chance.randint(1, 4))
    faults = tuple(
        Fault(
            kind,
            seconds * chance.uniform(0, 1) / len(kinds),
            chance.choice(stops_s) if "stop" in kind else chance.choice(aways_s),
        )
        for kind in kinds
    )
    durability = chance.choice(["journal", "journal", "store"])
    batch_rows = max(1, round(num_rows * 10 ** chance.uniform(-2, -0.7)))
    upload = Upload(0, "articles", num_rows, batch_rows, durability, flawed=False)
    return Plan(seed, way, upload, seconds, faults, chance.choice(["10s", "60s"]))


def run(
    plan: Plan,
    start_longbow: Callable[[Path], LongbowServer],
    launcher: Launcher,
    models: Path,
    folder: Path,
) -> Report:
    """Carry out a plan.

    Args:
        plan: The plan.
        start_longbow: Starts a Longbow with files in a folder.
        launcher: Starts Fletcher's processes.
        models: Folder of bundles with the model `tiny`.
        folder: Empty folder; deleted unless a promise was broken.

    Raises:
        ScheduleError: A promise was broken.
    """
    again = f"--longbow 1 --first {plan.seed}"
    with (
        told(plan.seed, plan, again, folder) as story,
        _Run(plan, start_longbow, launcher, models, folder, story) as one,
    ):
        return one.run()


class _Run:
    """One plan and its processes."""

    def __init__(
        self,
        plan: Plan,
        start_longbow: Callable[[Path], LongbowServer],
        launcher: Launcher,
        models: Path,
        folder: Path,
        story: Story,
    ) -> None:
        self._plan = plan
        self._launcher = launcher
        self._folder = folder
        self._story = story
        self._tell = story.tell
        self._report = Report(num_rows=plan.upload.num_rows)
        self._home = folder / "home"
        diaries = folder / "diaries"
        for one in (self._home, diaries):
            one.mkdir(parents=True)
        (self._home / "models").symlink_to(models)
        self._longbow = start_longbow(folder / "longbow")
        self._ledger = Ledger(
            [plan.upload],
            diaries,
            home=self._home,
            read_store=self._longbow.table,
            null_vectors=False,
        )
        self._job: _Ingest | _Serve

    def __enter__(self) -> _Run:
        with ExitStack() as stack:
            stack.callback(self._launcher.end_all)
            stack.callback(self._longbow.close)
            num_bytes = self._plan.upload.num_rows * 4 * 96
            self._proxy = stack.enter_context(
                Proxy(self._longbow.data_port, bytes_per_s=num_bytes / self._plan.seconds)
            )
            address = f"grpc://127.0.0.1:{self._proxy.port}?meta={self._longbow.meta_port}"
            kind = _Ingest if self._plan.way == "ingest" else _Serve
            self._job = kind(self._plan, self._launcher, self._folder, address, self._ledger)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._longbow.go_on()
        self._stack.close()

    def run(self) -> Report:
        self._start_job()
        for fault in self._plan.faults:
            time.sleep(fault.pause_s)
            self._happen(fault)
            self._report.faults[fault.kind] += 1
        self._finish()
        # What was reported as stored outlives Longbow.
        self._tell("all is reported as stored")
        self._report.seconds = self._story.seconds
        self._longbow.kill()
        if not self._restart():
            return self._report
        self._check_end()
        return self._report

    def _start_job(self) -> None:
        """Start Fletcher and wait until it has asked Longbow, which must be there at the start."""
        before = self._proxy.received
        self._job.start()
        asks = lambda: self._proxy.received > before + 2000 or self._job.is_done()  # noqa: E731
        eventually(asks, "Longbow is asked", 60)

    def _happen(self, fault: Fault) -> None:
        self._tell(fault.kind)
        if fault.kind == "kill fletcher":
            self._job.kill()
            self._start_job()
            return
        if fault.kind == "stop longbow":
            self._longbow.stop()
            time.sleep(fault.away_s)
            self._longbow.go_on()
            return
        if fault.kind == "kill longbow after an answer":
            before, until = self._proxy.received, time.monotonic() + 3
            while self._proxy.received == before and time.monotonic() < until:
                time.sleep(0.0005)
        self._longbow.kill()
        if fault.kind == "kill both":
            self._job.kill()
        time.sleep(fault.away_s)
        self._restart()
        if fault.kind == "kill both":
            self._start_job()
        if not self._report.num_torn:
            self._ledger.check()

    def _restart(self) -> bool:
        """Start Longbow; an empty one if it does not start with its files."""
        started = self._longbow.start()
        if not started:
            self._tell("Longbow does not start with its files")
            self._report.num_torn += 1
            assert self._longbow.start(empty=True), "an empty Longbow does not start"
        return started

    def _finish(self) -> None:
        """Wait until all rows are reported as stored; after a torn Longbow, without a check."""
        self._tell("to the end")
        while not self._job.finish(self._tell):
            assert self._report.num_torn, "the user has to run the command again"
            self._report.num_steps += 1
            self._start_job()

    def _check_end(self) -> None:
        if self._report.num_torn:  # rows of before are in files that Longbow cannot read
            return
        stored = self._ledger.look().stored[0]
        wrong = np.flatnonzero(stored != 1)
        assert not len(wrong), (
            f"{len(wrong)} rows are not stored once: {wrong[:8].tolist()}, "
            f"{stored[wrong[:8]].tolist()} times"
        )


class _Ingest:
    """`fletcher ingest` of one file."""

    def __init__(
        self, plan: Plan, launcher: Launcher, folder: Path, address: str, ledger: Ledger
    ) -> None:
        self._launcher = launcher
        self._folder = folder
        self._status = folder / "status"
        file = folder / "articles.parquet"
        upload = plan.upload
        pq.write_table(
            pa.Table.from_batches(upload.batches(0)), file, row_group_size=upload.batch_rows
        )
        diary = ledger.new_diary(upload)
        diary.write_text(json.dumps({"sent": [0, upload.num_rows]}) + "\n")
        self._argv = [
            *("ingest", str(file), "--id", "id", "--columns", "n", "--dataset", upload.dataset),
            *("--store", address, "--home", str(folder / "home"), "--model", "tiny"),
            *("--backend", "null", "--json"),
        ]
        self._process: Process | None = None

    def start(self) -> None:
        self._status.unlink(missing_ok=True)
        log = self._folder / "ingest.log"
        self._process = self._launcher.start(
            "command", log, argv=self._argv, status=str(self._status)
        )

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    def is_done(self) -> bool:
        return self._process is not None and not self._process.alive

    def finish(self, tell: Callable[[str], None]) -> bool:
        """Wait for its end; returns whether it was successful."""
        assert self._process is not None
        assert self._process.wait(_LAST_STOP_S), "fletcher ingest does not end"
        status = self._status.read_text()
        tell(f"fletcher ingest ends with {status}")
        return status == "0"


class _Serve:
    """`fletcher-serve` and a client that uploads."""

    def __init__(
        self, plan: Plan, launcher: Launcher, folder: Path, address: str, ledger: Ledger
    ) -> None:
        self._plan = plan
        self._launcher = launcher
        self._folder = folder
        self._ledger = ledger
        self._port = free_port()
        self._argv = [
            *("--home", str(folder / "home"), "--model", "tiny", "--backend", "null"),
            *("--port", str(self._port), "--store", address, "--tokenizer-workers", "1"),
            *("--max-row-bytes", str(MAX_ROW_BYTES), "--drain-timeout", "20s"),
            *("--store-timeout", plan.store_timeout),
        ]
        self._server: Process | None = None
        self._client: Process | None = None
        self._diary: Path | None = None

    def start(self) -> None:
        log = self._folder / "server.log"
        self._server = self._launcher.start_server("serve", log, argv=self._argv, constants={})
        if self._client is None:
            self._upload()

    def _upload(self) -> None:
        self._diary = self._ledger.new_diary(self._plan.upload)
        self._diary.touch()
        self._client = self._launcher.start(
            "upload",
            self._folder / "clients.log",
            address=f"grpc://127.0.0.1:{self._port}",
            diary=str(self._diary),
            plan=self._plan.upload.as_dict(),
            resume=True,
            transfer={"max_retries": 1000, "backoff_s": 0.05, "max_backoff_s": 0.5},
        )

    def kill(self) -> None:
        assert self._server is not None
        self._server.kill()

    def is_done(self) -> bool:
        return self._client is not None and not self._client.alive

    def finish(self, tell: Callable[[str], None]) -> bool:
        """Wait until the journal is empty; returns whether it was successful."""
        assert self._client is not None
        assert self._diary is not None
        assert self._server is not None
        assert self._client.wait(_LAST_STOP_S), "the upload does not end"
        last = list(entries(self._diary))[-1]
        tell(f"the upload ends with {last}")
        if "summary" not in last:
            assert last.get("error") in _RETRYABLE, f"the upload fails: {last}"
            self._upload()
            return False
        upload = self._plan.upload
        expected = {"complete": True, "rows_durable": upload.num_rows, "rows_failed": 0}
        wrong = {key: last["summary"][key] for key in expected} != expected
        assert not wrong, f"the upload ends with {last}"

        def is_settled() -> bool:
            return not self._ledger.look().journaled[0].any()

        eventually(is_settled, "the journal is empty", _LAST_STOP_S)
        self._server.send(signal.SIGTERM)
        assert self._server.wait(60), "the server does not end"
        return True
