"""Plays random schedules of uploads and faults, and checks what must hold.

A seed gives the plan: uploads, sizes, faults and pauses. It does not determine the timing of the
processes, so a failure may need several runs to come back.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections import Counter
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from fletcher.client import connect
from fletcher.errors import StoreUnavailableError
from fletcher.stores.address import open_store
from tests.doubles.longbow import LongbowDouble
from tests.faults import refusals
from tests.faults.intruder import Intruder, foreign_rows, stopped
from tests.faults.launching import Launcher, Process
from tests.faults.ledger import MAX_ROW_BYTES, Ledger, UnreadableError, Upload, entries
from tests.faults.nonsense import NonsenseStore
from tests.faults.overwrites import Overwritten
from tests.faults.plans import Event, Schedule
from tests.faults.powerloss import lose_power
from tests.faults.rewrites import Rewritten
from tests.faults.stories import Story, told
from tests.integration.processes import eventually

_SETTLE_S = 240.0
_COLUMNS = ("n", "id", "text", "vector", "point")
# No fault explains these errors.
_WRONG_ERRORS = {"upload_conflict", "invalid_command", "unknown_field", "column_type"}
# Errors after which a client may try again later; stores refuse rows with `not_finite`.
_LATER = {"store_unavailable", "overloaded", "unavailable", "not_finite"}
_MOST_RESUMES = 10
_CAUSES_LOGGED = ("drop a dataset", "make a dataset anew", "damage a file", "answer nonsense")
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
    num_refused: int = 0


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
    power = " --power" if schedule.power else ""
    again = f"--store {schedule.store}{power} --seed {schedule.seed}"
    with (
        told(schedule.seed, schedule, again, folder) as story,
        Play(schedule, launcher, models, folder, story) as play,
    ):
        return play.run()


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
        story: Story,
    ) -> None:
        self._plan = schedule
        self._launcher = launcher
        self._folder = folder
        self._tell = story.tell
        self._worker_killed = False
        self._report = Report()
        self._home = folder / "home"
        self._vectors = folder / "vectors"
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
        self._nonsense: NonsenseStore | None = None
        self._refusals = folder / "refusals"
        self._intruder = Intruder(
            "parquet" if schedule.store == "parquet" else "lance", self._vectors, folder / "hidden"
        )
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
            overwritten=schedule.overwrites
            and Overwritten(
                schedule.overwrites,
                diaries / "overwrites",
                home=self._home,
                read_store=self._read_store,
            ),
        )
        self._rewriter: Process | None = None
        self._overwriter: Process | None = None
        self.clients: dict[int, list[Process]] = {one.number: [] for one in schedule.uploads}

    def __enter__(self) -> Play:
        with ExitStack() as stack:
            stack.callback(self._launcher.end_all)
            if self._double is not None:
                stack.enter_context(self._double)
            self._store_address = self._start_store()
            if self._plan.has("answer nonsense"):
                data, meta = (f"grpc://127.0.0.1:{port}" for port in self._store_ports)
                self._nonsense = NonsenseStore(data, meta, self._may_refuse)
                stack.callback(self._nonsense.close)
                self._store_address = self._nonsense.address
            self.server = self._start_server()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> Report:
        for upload in self._plan.uploads:
            self.upload(upload)
        self._rewrite()
        self._overwrite()
        for event in self._plan.events:
            time.sleep(event.pause_s)
            upload = self._plan.uploads[event.number % len(self._plan.uploads)]
            self._tell(f"{event.kind} ({event.number})")
            self._report.faults[event.kind] += 1
            self.happen(event, upload)
            self._check()
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
        assert self.server.wait(60), "the server does not end"
        self.ledger.check_end()
        overwritten = self.ledger.overwritten
        if overwritten is not None:
            assert not self._staged(), f"staged datasets are left: {self._staged()}"
            wrong = [one for one in entries(overwritten.diary) if one.get("error") in _WRONG_ERRORS]
            assert not wrong, f"an overwrite fails: {wrong}"
        log = self.server.output()
        # For these faults the log has the traceback of LanceDB's or Arrow's error.
        logs_cause = any(map(self._plan.has, _CAUSES_LOGGED))
        assert "Traceback" not in log or logs_cause, "a traceback in the server's log"

    def happen(self, event: Event, upload: Upload) -> None:
        """Carry out a fault; of client faults, `upload` is the victim."""
        if self._double is not None and event.kind in _DOUBLING:
            self.ledger.may_double = True
        match event.kind:
            case "kill the server":
                self.server.kill()
                self._check()
                self.server = self._start_server()
            case "cut the power":
                self.server.kill()
                self._cut_power(
                    self._notes, [self._home, *([] if self._store else [self._vectors])]
                )
                self._check()
                self.server = self._start_server()
            case "end the server":
                self.server.send(signal.SIGTERM)
                assert self.server.wait(60), "the server does not end"
                self._check()
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
                self._check()
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
            case "drop a dataset" | "make a dataset anew":
                self._drop(event)
            case "damage a file":
                self._damage(event)
            case "leave a call":
                self._leave(event, upload)
            case "kill the overwriter":
                self._overwrite()
            case "drop the overwrite":
                self._drop_overwrite()
            case "answer nonsense":
                assert self._nonsense is not None
                self._nonsense.begin(event.number)
            case "refuse rows":
                self._tell(refusals.begin(self._refusals, event.number))
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
        if self._overwriter is not None:
            assert self._overwriter.wait(_SETTLE_S), "not all overwrites are complete"
        self._check()
        for upload in self._plan.uploads:
            self._check_refused(upload)
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
            dropped = self.ledger.was_dropped(upload.dataset)
            if "summary" in last and (last["summary"]["complete"] or not dropped):
                return dict(last["summary"])
            later = _LATER | ({"upload_conflict"} if dropped else set())
            told = "summary" in last or last.get("error") in later
            assert told, f"{upload} does not come to its end: {last}"
            time.sleep(0.5)
        raise AssertionError(f"{upload} does not come to its end: {last}")

    def _check_refused(self, upload: Upload) -> None:
        """Check that the rows that the store refused are reported as not durable."""

        def is_reported() -> bool:
            refused = self.ledger.refused(upload)
            if not refused.any():
                return True
            with connect(self.address) as client:
                status = client.upload_status(upload.upload_id, upload.dataset)
            durable = np.zeros(upload.num_rows, bool)
            for first, last in status["ranges"]:
                durable[first : last + 1] = True
            return not status["complete"] and not (refused & durable).any()

        eventually(is_reported, f"the refused rows of {upload} are reported", _SETTLE_S)

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
                    self._assert_right_error(upload, entry)

    def _assert_right_error(self, upload: Upload, entry: dict[str, Any]) -> None:
        unstored = self.ledger.was_dropped(upload.dataset) or self._plan.has("refuse rows")
        if entry["error"] == "upload_conflict" and unstored:
            for name in (upload.dataset, upload.upload_id, "gone"):
                assert name in entry["message"], f"{upload}: {entry} does not name {name}"
            return
        assert entry["error"] not in _WRONG_ERRORS, f"{upload}: {entry}"
        if entry["error"] == "not_finite":
            assert refusals.MESSAGE in entry["message"], f"{upload}: {entry}"

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
        if self.ledger.rewritten is not None:
            self._rewriter = self._restart("rewrite", self.ledger.rewritten, self._rewriter)

    def _overwrite(self) -> None:
        """Kill the client that overwrites a dataset, if one runs, and start another one."""
        if self.ledger.overwritten is not None:
            self._overwriter = self._restart("overwrite", self.ledger.overwritten, self._overwriter)

    def _restart(
        self, role: str, versions: Rewritten | Overwritten, running: Process | None
    ) -> Process:
        """Kill the client of a role, if one runs, and start another one."""
        if running is not None:
            running.kill()
        versions.diary.touch()
        return self._launcher.start(
            role,
            self._folder / "clients.log",
            address=self.address,
            diary=str(versions.diary),
            plan=versions.plan.as_dict(),
            transfer=self._plan.transfer,
        )

    def _drop_overwrite(self) -> None:
        """Drop the unfinished version by `fletcher overwrite`; the dataset keeps its rows."""
        overwritten = self.ledger.overwritten
        assert overwritten is not None
        assert self._overwriter is not None
        self._overwriter.kill()
        if self._nonsense is not None:
            self._nonsense.end()
        self.server.send(signal.SIGTERM)
        assert self.server.wait(60), "the server does not end"
        self._check()
        staged = self._staged()
        where = ("--home", str(self._home), "--store", self._store_address)
        listed = self._command("overwrite", "list", *where)
        for name in staged:
            assert name in listed, f"{name} is not listed: {listed}"
        for name in {*staged, *overwritten.staged_in_journal()}:
            self._tell(f"drops {name}")
            told = self._command("overwrite", "drop", name, *where)
            assert f"dropped {name}" in told, told
            self._report.faults["overwrites dropped"] += 1
        assert not self._staged()
        assert not overwritten.staged_in_journal()
        self._check()
        self.server = self._start_server()
        self._overwrite()

    def _staged(self) -> list[str]:
        """Names of the staged datasets."""
        with closing(open_store(self._embedded)) as store:
            return [info.name for info in store.staged_datasets()]

    def _command(self, *argv: str) -> str:
        """Run a command of Fletcher; returns what it printed."""
        log = self._folder / "commands.log"
        log.touch()
        before = len(log.read_text())
        process = self._launcher.start("command", log, argv=list(argv))
        assert process.wait(_SETTLE_S), f"{argv} does not end"
        return process.output()[before:]

    def _drop(self, event: Event) -> None:
        """Drop a dataset without the server's knowledge, and perhaps make it anew."""
        chance = random.Random(event.number)
        dataset = chance.choice(sorted({one.dataset for one in self._plan.uploads}))
        schema = None
        if self._intruder.damage is None or self._intruder.damage.dataset != dataset:
            schema = self._intruder.schema_of(dataset)
        anew = chance.randint(1, 5) if event.kind == "make a dataset anew" else 0
        if schema is None:
            self._tell(f"{dataset} is not there")
            return
        if self._store is not None and chance.random() < 0.6:
            self._drop_by_action(dataset, schema, anew)
        else:
            writer = self._store or self.server
            with stopped(writer):
                if self._intruder.schema_of(dataset) is None:
                    return
                self.ledger.note_dropped(dataset, racing=False)
                self._intruder.drop(dataset)
                self.ledger.foreign[dataset] = anew
                if anew:
                    named = chance.random() < 0.7
                    self._intruder.make_anew(dataset, schema, anew, named=named)
        self._tell(f"{dataset} was dropped, {anew} rows are new")

    def _drop_by_action(self, dataset: str, schema: pa.Schema, anew: int) -> None:
        data, meta = self._store_ports
        with closing(open_store(f"grpc://127.0.0.1:{data}?meta={meta}")) as store:
            store.delete_dataset(dataset)
            self.ledger.note_dropped(dataset, racing=True)
            if anew:
                rows = foreign_rows(schema, anew)
                writer = store.open_writer(dataset, schema, "append")
                writer.append([rows])
                self.ledger.foreign[dataset] = anew

    def _damage(self, event: Event) -> None:
        """Move away or cut a data file of a dataset. It is repaired after all events."""
        datasets = sorted({one.dataset for one in self._plan.uploads})
        dataset = datasets[event.number % len(datasets)]
        with stopped(self._store or self.server):
            if not self._intruder.damage_file(dataset, event.number):
                self._tell(f"{dataset} has no files")
                return
        damage = self._intruder.damage
        assert damage is not None
        self._tell(f"{damage.path} is {'cut' if damage.cut else 'lost'}")

    def _leave(self, event: Event, upload: Upload) -> None:
        """Let a client send some rows and leave."""
        diary = self.ledger.new_diary(upload)
        diary.touch()
        client = self._launcher.start(
            "leave",
            self._folder / "clients.log",
            address=self.address,
            diary=str(diary),
            plan=upload.as_dict(),
            number=event.number,
        )
        self.clients[upload.number].append(client)

    def _may_refuse(self, dataset: str) -> bool:
        return any(upload.dataset == dataset for upload in self._plan.uploads)

    def _check(self) -> None:
        refused = sum(int(rows.sum()) for rows in self.ledger.check().refused.values())
        self._report.num_refused = max(self._report.num_refused, refused)
        self._intruder.check()

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
        if self._plan.store in ("lance", "parquet"):
            return self._embedded
        if self._double is not None:
            return f"{self._double.address}&profile=longbow"
        data, meta = self._store_ports
        argv = ["--path", str(self._vectors), "--port", str(data), "--meta-port", str(meta)]
        self._store = self._start("store", argv, self._folder / "store.log", self._store_notes)
        return f"grpc://127.0.0.1:{data}?meta={meta}"

    def _start(self, role: str, argv: list[str], log: Path, notes: Path) -> Process:
        process = self._launcher.start_server(
            role,
            log,
            argv=argv,
            constants=self._plan.constants,
            syncs=str(notes) if self._plan.power else None,
            refusals=self._plan.has("refuse rows")
            and (str(self._refusals), sorted({one.dataset for one in self._plan.uploads})),
        )
        self._tell(f"{role} listens as {process.pid}")
        return process

    @property
    def _embedded(self) -> str:
        """Address of the folder of vectors."""
        return f"{'parquet' if self._plan.store == 'parquet' else 'lance'}:{self._vectors}"

    def _bring_up(self) -> None:
        """End faults that last."""
        self._intruder.repair()
        refusals.end(self._refusals)
        if self._nonsense is not None:
            self._nonsense.end()
            self._report.faults.update(self._nonsense.told)
        if self._double is not None:
            self._double.fail_after = None

    def _kill_worker(self, number: int) -> None:
        try:
            children = psutil.Process(self.server.pid).children(recursive=True)
            # With a process that forks the workers, these are its children.
            workers = [one.pid for one in children if one.ppid() != self.server.pid] or [
                one.pid for one in children
            ]
        except psutil.NoSuchProcess:  # such as a worker that was killed just now
            return
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

    def _read_store(self, dataset: str, tries: int = 20) -> pa.Table | None:
        """The store's rows, also if its process was killed.

        Files of a Parquet dataset may go away while they are read, because the dataset is replaced.
        """
        if self._double is not None:
            return self._double.table(dataset) if dataset in self._double.tables else None
        damage = self._intruder.damage
        if damage is not None and damage.dataset == dataset and damage.is_silent:
            raise UnreadableError
        with closing(open_store(self._embedded)) as store:
            try:
                info = store.dataset(dataset)
                if info is None:
                    return None
                columns = [name for name in _COLUMNS if name in info.schema.names]
                return store.scan(dataset, columns=columns).read_all()
            except StoreUnavailableError as error:
                if damage is None or damage.dataset != dataset:
                    if self._plan.store != "parquet" or tries == 1:
                        raise
                    return self._read_store(dataset, tries - 1)
                if damage.path.name not in error.message:
                    raise AssertionError(f"{damage.path.name} is not named") from error
                raise UnreadableError from error


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
