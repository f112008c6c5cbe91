"""Plays random schedules of uploads and faults, and checks what must hold.

A seed gives the plan: uploads, sizes, faults and pauses. It does not determine the timing of the
processes, so a failure may need several runs to come back.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from tests.doubles.longbow import LongbowDouble
from tests.faults.launching import Launcher, Process
from tests.faults.ledger import MAX_ROW_BYTES, Ledger, Upload, entries
from tests.faults.plans import Event, Schedule
from tests.faults.powerloss import lose_power
from tests.faults.reading import StoredRows
from tests.faults.rewrites import Rewritten
from tests.integration.processes import eventually

_READY = "listening on "
_START_S = 60.0
_SETTLE_S = 60.0
_COLUMNS = ["n", "id", "text", "vector"]
# No fault explains these errors.
_WRONG_ERRORS = {"upload_conflict", "invalid_command", "unknown_field", "column_type"}
# Errors after which a client may try again later.
_LATER = {"store_unavailable", "overloaded"}
_MOST_RESUMES = 10
# After these a store that only appends may still be appending when it is asked for its rows.
_DOUBLING = {"kill the server", "cut the power", "stall the store"}


@dataclass
class Report:
    """Counts of one schedule."""

    faults: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0
    num_given_up: int = 0
    num_doubled: int = 0
    num_undone: int = 0


class ScheduleError(AssertionError):
    """A broken promise, with the seed and the events before it."""


def run(schedule: Schedule, launcher: Launcher, models: Path, folder: Path) -> Report:
    """Play a schedule.

    Args:
        schedule: The plan.
        launcher: Starts its processes; all of them end.
        models: Folder of bundles with the model `tiny`.
        folder: Empty folder; deleted unless a promise was broken.

    Raises:
        ScheduleError: A promise was broken.
    """
    story: list[str] = []
    try:
        with Play(schedule, launcher, models, folder, story) as play:
            report = play.run()
    except Exception as error:
        power = " --power" if schedule.power else ""
        told = "\n".join(f"  {line}" for line in story)
        raise ScheduleError(
            f"seed {schedule.seed}: {type(error).__name__}: {error}\n"
            f"again by: scripts/soak --store {schedule.store}{power} --seed {schedule.seed}\n"
            f"{schedule}\nwhat happened:\n{told}\nfiles: {folder}"
        ) from error
    shutil.rmtree(folder)
    return report


class FaultyLongbow(LongbowDouble):
    """Answers one message late if `pause_s` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.pause_s = 0.0

    def store(self, dataset: str, batch: pa.RecordBatch) -> None:
        pause_s, self.pause_s = self.pause_s, 0.0
        time.sleep(pause_s)
        super().store(dataset, batch)


class Play:
    """One schedule and its processes."""

    def __init__(
        self,
        schedule: Schedule,
        launcher: Launcher,
        models: Path,
        folder: Path,
        story: list[str],
    ) -> None:
        self._plan = schedule
        self._launcher = launcher
        self._folder = folder
        self._story = story
        self._began = time.monotonic()
        self._worker_killed = False
        self._report = Report()
        self._home = folder / "home"
        self._vectors = folder / "vectors"
        self._stored = StoredRows(self._vectors)
        self._notes = folder / "power" / "syncs"
        self._store_notes = folder / "store-power" / "syncs"
        diaries = folder / "diaries"
        for one in (self._home, self._vectors, self._notes.parent, self._store_notes.parent):
            one.mkdir(parents=True)
        diaries.mkdir()
        (self._home / "models").symlink_to(models)
        self._port = free_port()
        self.address = f"grpc://127.0.0.1:{self._port}"
        self._store_ports = (free_port(), free_port())
        self._double = FaultyLongbow() if schedule.store == "longbow" else None
        self._store: Process | None = None
        self.ledger = Ledger(
            schedule.uploads,
            diaries,
            home=self._home,
            read_store=self._read_store,
            null_vectors=schedule.store != "longbow",
            rewritten=schedule.rewrites
            and Rewritten(
                schedule.rewrites,
                diaries / "rewrites",
                home=self._home,
                read_store=self._read_store,
            ),
        )
        self._rewriter: Process | None = None
        self.clients: dict[int, list[Process]] = {one.number: [] for one in schedule.uploads}

    def __enter__(self) -> Play:
        with ExitStack() as stack:
            stack.callback(self._launcher.end_all)
            if self._double is not None:
                stack.enter_context(self._double)
            self._store_address = self._start_store()
            self.server = self._start_server()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> Report:
        for upload in self._plan.uploads:
            self.upload(upload)
        self._rewrite()
        for event in self._plan.events:
            time.sleep(event.pause_s)
            upload = self._plan.uploads[event.number % len(self._plan.uploads)]
            self._tell(f"{event.kind} ({event.number})")
            self._report.faults[event.kind] += 1
            self.happen(event, upload)
            self.ledger.check()
        self._bring_up()
        self._resume_all()
        self._assert_no_wrong_error()
        self.finish()
        self._report.num_doubled = self.ledger.num_doubled
        self._report.num_given_up = self.ledger.num_given_up
        self._report.num_rows = sum(upload.num_rows for upload in self._plan.uploads)
        return self._report

    def finish(self) -> None:
        """End the server after all uploads, and check that each row is stored."""
        eventually(self.ledger.all_stored, "all rows are stored", _SETTLE_S)
        self._tell("all is there")
        self.server.send(signal.SIGTERM)
        assert self.server.wait(30), "the server does not end"
        self.ledger.check_end()
        log = self.server.output()
        assert "Traceback" not in log, "a traceback in the server's log"

    def happen(self, event: Event, upload: Upload) -> None:
        """Carry out a fault; of client faults, `upload` is the victim."""
        if self._double is not None and event.kind in _DOUBLING:
            self.ledger.may_double = True
        match event.kind:
            case "kill the server":
                self.server.kill()
                self.ledger.check()
                self.server = self._start_server()
            case "cut the power":
                self.server.kill()
                self._cut_power(
                    self._notes, [self._home, *([] if self._store else [self._vectors])]
                )
                self.ledger.check()
                self.server = self._start_server()
            case "end the server":
                self.server.send(signal.SIGTERM)
                assert self.server.wait(60), "the server does not end"
                self.ledger.check()
                self.server = self._start_server()
            case "kill a worker":
                self._kill_worker(event.number)
            case "kill a client":
                for client in self.clients[upload.number]:
                    client.kill()
                self._rewrite()
            case "resume":
                self.upload(upload, resume=True)
            case "send again":
                self.upload(upload, first=event.number % upload.num_rows)
            case "kill the store" | "cut the store's power":
                assert self._store is not None
                self._store.kill()
                if event.kind == "cut the store's power":
                    self._cut_power(self._store_notes, [self._vectors])
                self.ledger.check()
                self._start_store()
            case "stop the store":
                assert self._store is not None
                self._store.send(signal.SIGSTOP)
                time.sleep(0.3)
                self._store.send(signal.SIGCONT)
            case "break the store's call":
                assert self._double is not None
                self._double.fail_after = event.number % 4
            case "stall the store":
                assert self._double is not None
                self._double.pause_s = 0.3
            case "check":
                pass
            case _:
                raise AssertionError(event.kind)

    def _resume_all(self) -> None:
        """Resume every upload to its end."""
        self._tell("to the end")
        for upload in self._plan.uploads:
            for client in self.clients[upload.number]:
                if not client.wait(_SETTLE_S):
                    raise AssertionError(f"a client of {upload} does not end")
        if self._rewriter is not None:
            assert self._rewriter.wait(_SETTLE_S), "not all versions are acknowledged"
        for upload in self._plan.uploads:
            summary = self._resume(upload)
            self._check_summary(upload, summary)

    def _resume(self, upload: Upload) -> dict[str, Any]:
        """Resume an upload while it ends with retryable errors."""
        for _ in range(_MOST_RESUMES):
            diary = self.upload(upload, resume=True, max_retries=30)
            client = self.clients[upload.number][-1]
            assert client.wait(_SETTLE_S), f"the last client of {upload} does not end"
            last = list(entries(diary))[-1]
            if "summary" in last:
                return dict(last["summary"])
            assert last.get("error") in _LATER, f"{upload} does not come to its end: {last}"
            time.sleep(0.5)
        raise AssertionError(f"{upload} does not come to its end: {last}")

    def _check_summary(self, upload: Upload, summary: dict[str, Any]) -> None:
        assert summary["complete"] is True, f"{upload}: {summary}"
        assert summary["rows_received"] == upload.num_rows, f"{upload}: {summary}"
        if upload.durability != "memory":
            assert summary["rows_durable"] == upload.num_rows, f"{upload}: {summary}"

    def _assert_no_wrong_error(self) -> None:
        for upload in self._plan.uploads:
            for entry in self.ledger.entries(upload):
                if "error" in entry:
                    self._report.errors[entry["error"]] += 1
                    assert entry["error"] not in _WRONG_ERRORS, f"{upload}: {entry}"

    def upload(
        self, upload: Upload, *, first: int = 0, resume: bool = False, **transfer: Any
    ) -> Path:
        diary = self.ledger.new_diary(upload)
        diary.touch()
        client = self._launcher.start(
            "upload",
            self._folder / "clients.log",
            address=self.address,
            diary=str(diary),
            plan=upload.as_dict(),
            first=first,
            resume=resume,
            pause_s=self._plan.pause_s,
            transfer={**self._plan.transfer, **transfer},
        )
        self.clients[upload.number].append(client)
        return diary

    def _rewrite(self) -> None:
        """Start the client that replaces rows, after killing the last one."""
        rewritten = self.ledger.rewritten
        if rewritten is None:
            return
        if self._rewriter is not None:
            self._rewriter.kill()
        rewritten.diary.touch()
        self._rewriter = self._launcher.start(
            "rewrite",
            self._folder / "clients.log",
            address=self.address,
            diary=str(rewritten.diary),
            plan=rewritten.plan.as_dict(),
            transfer=self._plan.transfer,
        )

    def _start_server(self) -> Process:
        argv = [
            *("--home", str(self._home), "--model", self._plan.model),
            *("--backend", self._plan.backend),
            *("--port", str(self._port), "--store", self._store_address),
            *("--max-row-bytes", str(MAX_ROW_BYTES), "--tokenizer-workers", "1"),
            *("--drain-timeout", "20s"),
        ]
        for name, value in self._plan.options.items():
            argv += [f"--{name}", value]
        log = self._folder / "server.log"
        return self._start("serve", argv, log, self._notes)

    def _start_store(self) -> str:
        """Start the store, if it is a process; returns its address."""
        if self._plan.store == "lance":
            return f"lance:{self._vectors}"
        if self._double is not None:
            return f"{self._double.address}&profile=longbow"
        data, meta = self._store_ports
        argv = ["--path", str(self._vectors), "--port", str(data), "--meta-port", str(meta)]
        self._store = self._start("store", argv, self._folder / "store.log", self._store_notes)
        return f"grpc://127.0.0.1:{data}?meta={meta}"

    def _start(self, role: str, argv: list[str], log: Path, notes: Path) -> Process:
        log.touch()
        before = len(log.read_text(errors="replace"))
        process = self._launcher.start(
            role,
            log,
            argv=argv,
            constants=self._plan.constants,
            syncs=str(notes) if self._plan.power else None,
        )

        def listens() -> bool:
            if not process.alive:
                raise AssertionError(f"{role} does not start: {process.output()[before:]}")
            return _READY in process.output()[before:]

        eventually(listens, f"{role} listens", _START_S)
        self._tell(f"{role} listens as {process.pid}")
        return process

    def _bring_up(self) -> None:
        """End faults that last."""
        if self._double is not None:
            self._double.fail_after = None

    def _kill_worker(self, number: int) -> None:
        try:
            children = psutil.Process(self.server.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        # With a process that forks the workers, these are its children.
        workers = [one.pid for one in children if one.ppid() != self.server.pid] or [
            one.pid for one in children
        ]
        if workers:
            self.ledger.may_give_up = self._worker_killed
            self._worker_killed = True
            victim = sorted(workers)[number % len(workers)]
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)

    def _cut_power(self, notes: Path, folders: list[Path]) -> None:
        undone = lose_power(notes, folders)
        self._report.num_undone += len(undone)
        for one in undone:
            self._tell(one)

    def _read_store(self, dataset: str) -> pa.Table | None:
        """The store's rows, also if its process was killed."""
        if self._double is not None:
            return self._double.table(dataset) if dataset in self._double.tables else None
        return self._stored.table(dataset, _COLUMNS)

    def _tell(self, what: str) -> None:
        self._story.append(f"{time.monotonic() - self._began:.3f} s: {what}")


def free_port() -> int:
    """A free port below those that the system hands out."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
