"""Makes one call of a server fail while rows go to a store, and checks what must hold.

A run uploads some rows to a server with a journal, resumes the upload, sends another one, and ends
the server. A recording run counts all calls on the way of the rows, in all processes. Each point is
one of these calls: the first, the second or the last one of a call site. In its run the call fails.

Whatever call fails: what was acknowledged is stored or waits in the journal, each row is there
once and has the right vector, the next uploads work, nothing hangs, and the process ends.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from fletcher.delivery.journal.root import journal_folders, paths_in
from fletcher.delivery.journal.segment import REJECTED, WAITING, Segment, read_segments
from tests.faults.callsites import Control, Fault
from tests.faults.launching import Forking, Process
from tests.faults.longbow_servers import QUICK, DoubleServer
from tests.faults.points import FileControl, Point, Recording
from tests.faults.reading import LongbowRows, StoredRows
from tests.integration.flight_calls import command

NUM_ROWS = 2000
_BATCH_ROWS = 250
_MORE_ROWS = 300
_ALL_ROWS = NUM_ROWS + _MORE_ROWS
_DATASET = "rows"
_SCHEMA = pa.schema({"id": pa.utf8(), "text": pa.utf8(), "n": pa.int64()})
_NO_ROWS = pa.schema(
    {"n": pa.int64(), "text": pa.utf8(), "vector": pa.list_(pa.float32(), 1)}
).empty_table()
_COLUMNS = ["n", "text", "vector"]
# Short pauses, because a run waits for them if its call comes after a pause.
_CONSTANTS = {
    "fletcher.stores.lance.writer.COMPACT_FRAGMENTS": 3,
    "fletcher.delivery.delivery.DeliveryTiming": {
        "segment_idle_s": 0.1,
        "committer_linger_s": 0.2,
    },
    **QUICK,
}
# Texts of all rows: those of the first upload, then those of the second.
_TEXTS = pa.array([" ".join(["word"] * (row % 7) + [str(row)]) for row in range(_ALL_ROWS)])


@dataclass(frozen=True)
class Result:
    """Outcome of a point's run.

    `held`; `not reached`; `gone`: the call site no longer exists; or `broken` with the broken
    promise.
    """

    point: Point
    status: str
    detail: str
    seconds: float

    @property
    def slow(self) -> bool:
        """Whether a time limit passed."""
        return self.seconds > Limits.call_s


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds, and whether a run records."""

    call_s: float = 20.0
    settle_s: float = 20.0
    start_s: float = 60.0


class BrokenError(AssertionError):
    """A promise that did not hold."""


class Run:
    """One run.

    Args:
        store: One of STORES.
        point: The call that fails; None: calls are counted.
        launcher: A launcher with the preloaded library.
        models: Folder of bundles with the model `tiny`.
        folder: Empty folder.
        limits: Time limits.
    """

    def __init__(
        self,
        store: str,
        point: Point | None,
        launcher: Forking,
        models: Path,
        folder: Path,
        limits: Limits = Limits(),
    ) -> None:
        self._store_kind = store
        self._point = point
        self._launcher = launcher
        self._folder = folder
        self._limits = limits
        self._vectors = folder / "vectors"
        self._longbow = DoubleServer() if store == "longbow" else None
        kind = "parquet" if store == "parquet" else "lance"
        self._rows: LongbowRows | StoredRows = StoredRows(self._vectors, kind)
        if self._longbow is not None:
            self._rows = LongbowRows(self._longbow)
        self._home = folder / "home"
        self._home.mkdir(parents=True)
        self._vectors.mkdir()
        (self._home / "models").symlink_to(models)
        self.calls = Control(folder / "calls", len(launcher.sites))
        self.file_calls = FileControl(folder / "file_calls", folder, point)
        self._store: Process | None = None

    def record(self) -> Recording:
        """Play without a fault."""
        self._start()
        self._arm(on=True)
        answers, error = self._put("u", NUM_ROWS)
        assert error is None, error
        assert answers[-1]["complete"], answers
        self._await(lambda: self._num_stored() >= NUM_ROWS, "all rows are stored")
        self._await(self._at_rest, "the dataset's threads end")
        self._arm(on=False)
        more, _ = self._put("v", _MORE_ROWS)
        assert more[-1]["complete"], more
        self._await(lambda: self._num_stored() >= _ALL_ROWS, "more rows are stored")
        table = self._stored()
        vectors = np.zeros((_ALL_ROWS, table.schema.field("vector").type.list_size), np.float32)
        vectors[table["n"].to_numpy()] = _matrix(table)
        self._end()
        return Recording(self.calls.counts(), self.file_calls.counts(), vectors)

    def play(self, vectors: Any) -> bool:
        """Play with the fault, and check what must hold.

        Args:
            vectors: The right vector of each row of each upload.

        Returns:
            Whether the call was reached.

        Raises:
            BrokenError: A promise was broken.
        """
        self._start()
        self._arm(on=True)
        answers, error = self._put("u", NUM_ROWS)
        self._check_answer(answers, error)
        durable = max((one["rows_durable"] for one in answers), default=0)
        self._settle(durable)
        self._arm(on=False)
        if not self._fired:
            self.kill()
            return False
        self._check(durable, vectors)
        self._upload_to_its_end("u", NUM_ROWS)
        self._check(NUM_ROWS, vectors)
        self._upload_to_its_end("v", _MORE_ROWS)
        num_rows = _ALL_ROWS
        self._await(lambda: self._num_stored() >= num_rows, "all rows are stored")
        self._end()
        self._check(NUM_ROWS, vectors)
        stored = self._num_stored()
        _require(stored == num_rows, f"{stored} of {num_rows} rows are stored at the end")
        folders = [folder for _, _, folder in journal_folders(self._home / "journal")]
        rejected = [path for one in folders for path in paths_in(one) if path.suffix == REJECTED]
        _require(not rejected, "rows were rejected for good")
        return True

    def kill(self) -> None:
        """End the processes at once."""
        self._launcher.end_all()
        if self._longbow is not None:
            self._longbow.close()

    def log(self) -> str:
        """The server's output."""
        return self._server.output() if hasattr(self, "_server") else ""

    @property
    def _fired(self) -> bool:
        return self.calls.fired or self.file_calls.fired

    def _arm(self, *, on: bool) -> None:
        self.calls.arm(on=on)
        self.file_calls.arm(on=on)

    def _start(self) -> None:
        address = f"{self._store_kind}:{self._vectors}"
        if self._store_kind == "fletcher":
            argv = ["--path", str(self._vectors), "--port", "0", "--meta-port", "0"]
            self._store, line = self._launch("store", argv)
            words = line.replace(")", "").split()
            address = f"{words[0]}?meta={words[2].rpartition(':')[2]}"
        if self._longbow is not None:
            address = self._longbow.address
        argv = [
            *("--home", str(self._home), "--model", "tiny", "--backend", "null"),
            *("--port", "0", "--store", address, "--tokenizer-workers", "1"),
            *("--drain-timeout", "5s", "--group-rows", "500", "--group-delay-ms", "1"),
        ]
        self._server, line = self._launch("serve", argv)
        self._address = line.split()[0]

    def _launch(self, role: str, argv: list[str]) -> tuple[Process, str]:
        fault = None
        if self._point is not None and self._point.role:
            point = self._point
            number = [one.name for one in self._launcher.sites].index(point.site)
            fault = asdict(Fault(number, point.role, point.index, point.how))
        log = self._folder / f"{role}.log"
        log.touch()
        process = self._launcher.start(
            role,
            log,
            argv=argv,
            constants=_CONSTANTS,
            faults={
                "role": "front" if role == "serve" else "store",
                "calls": str(self._folder / "calls"),
                "file_calls": str(self._folder / "file_calls"),
                "fault": fault,
            },
        )
        deadline = time.monotonic() + self._limits.start_s
        while "listening on " not in (text := process.output()) or not text.endswith("\n"):
            assert process.alive, f"{role} does not start: {text}"
            assert time.monotonic() < deadline, f"{role} does not start in time: {text}"
            time.sleep(0.02)
        return process, text.partition("listening on ")[2].splitlines()[0]

    def _put(self, upload_id: str, num_rows: int) -> tuple[list[dict[str, Any]], Exception | None]:
        """Send all rows of an upload; returns the answers, and the call's error."""
        options = flight.FlightCallOptions(timeout=self._limits.call_s)
        descriptor = command(dataset=_DATASET, upload_id=upload_id, dtype="float32", columns=["n"])
        answers: list[dict[str, Any]] = []
        batches = [
            _batch(upload_id, first, min(first + _BATCH_ROWS, num_rows))
            for first in range(0, num_rows, _BATCH_ROWS)
        ]
        with flight.connect(self._address) as client:
            writer, reader = client.do_put(descriptor, batches[0].schema, options)

            def read() -> None:
                with suppress(flight.FlightError, pa.ArrowException, StopIteration):
                    while (answer := reader.read()) is not None:
                        answers.append(json.loads(answer.to_pybytes()))

            thread = threading.Thread(target=read)
            thread.start()
            with suppress(flight.FlightError, pa.ArrowException, OSError):  # `close` raises it
                for batch in batches:
                    writer.write_batch(batch)
                writer.write_metadata(json.dumps({"end": True, "rows": num_rows}).encode())
            with suppress(flight.FlightError, pa.ArrowException, OSError):
                writer.done_writing()
            thread.join()
            try:
                writer.close()
            except (flight.FlightError, pa.ArrowException, OSError) as error:
                return answers, error
        return answers, None

    def _check_answer(self, answers: list[dict[str, Any]], error: Exception | None) -> None:
        self._check_alive()
        _require(not isinstance(error, flight.FlightTimedOutError), "the call hangs")
        if error is None:
            whole = answers and answers[-1]["type"] == "summary"
            _require(bool(whole), "the call ends well without a summary")
            failed = answers[-1]["rows_failed"]
            _require(not failed, f"{failed} rows failed: {answers[-1]['errors'][:1]}")

    def _settle(self, durable: int) -> None:
        """Wait until the call has failed, and the acknowledged rows are stored or do not come."""
        deadline = time.monotonic() + self._limits.settle_s
        while time.monotonic() < deadline:
            self._check_alive()
            if self._num_stored() >= durable:
                break
            time.sleep(0.02)
        while not (self._fired or self._at_rest()) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _at_rest(self) -> bool:
        """Whether the dataset's threads have ended. The last thread deletes its journal.

        For a Longbow, sent segments stay for a while.
        """
        left = _DATASET if self._longbow is None else f"{_DATASET}/*{WAITING}"
        return not any(self._home.glob(f"journal/*/{left}"))

    def _upload_to_its_end(self, upload_id: str, num_rows: int) -> None:
        """Send an upload until it is complete; only retryable errors may come before."""
        deadline = time.monotonic() + self._limits.settle_s
        while True:
            answers, error = self._put(upload_id, num_rows)
            if error is None:
                break
            code = _code(error)
            self._check_alive()
            retryable = code in ("store_unavailable", "overloaded", "journal_full")
            _require(retryable, f"the next upload {upload_id} fails: {code} {str(error)[:300]}")
            _require(time.monotonic() < deadline, f"upload {upload_id} never works: {code}")
            time.sleep(0.1)
        _require(
            bool(answers) and answers[-1]["complete"],
            f"{upload_id} is not complete: {answers[-1:]}",
        )
        _require(answers[-1]["rows_durable"] == num_rows, f"{upload_id}: {answers[-1]}")

    def _check(self, durable: int, vectors: Any) -> None:
        """Check the rows that are there now."""
        waiting = self._waiting()
        table = self._stored()
        rows = table["n"].to_numpy()
        times = np.bincount(rows, minlength=_ALL_ROWS)
        doubled = np.flatnonzero(times > 1)
        _require(not len(doubled), f"{len(doubled)} rows are doubled, the first is {doubled[:1]}")
        right = table["text"].combine_chunks().equals(_TEXTS.take(pa.array(rows)))
        _require(right, "rows have another text")
        without = rows[_array(table, "vector").is_null().to_numpy(zero_copy_only=False)]
        _require(
            not len(without), f"{len(without)} rows have no vector, the first is {without[:1]}"
        )
        wrong = rows[(_matrix(table) != vectors[rows]).any(axis=1)]
        _require(not len(wrong), f"{len(wrong)} rows have another vector, the first is {wrong[:1]}")
        lost = np.flatnonzero(~waiting[:durable] & (times[:durable] == 0))
        _require(
            not len(lost), f"{len(lost)} acknowledged rows are nowhere, the first is {lost[:1]}"
        )

    def _waiting(self) -> Any:
        """Whether each row of the first upload waits in the journal."""
        rows = np.zeros(NUM_ROWS, bool)
        for _, _, folder in journal_folders(self._home / "journal"):
            for _, segment in read_segments(folder.glob(f"*{WAITING}")):
                for group in segment.groups if isinstance(segment, Segment) else ():
                    if not group.settled and group.info.upload_id == "u":
                        rows[group.info.first : group.info.last + 1] = True
        return rows

    def _num_stored(self) -> int:
        return self._rows.num_rows(_DATASET)

    def _stored(self) -> pa.Table:
        """Number, text and vector of all stored rows."""
        table = self._rows.table(_DATASET, _COLUMNS)
        return _NO_ROWS if table is None else table

    def _await(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self._limits.settle_s
        while not holds():
            self._check_alive()
            _require(time.monotonic() < deadline, f"not within {self._limits.settle_s:g} s: {what}")
            time.sleep(0.02)

    def _check_alive(self) -> None:
        _require(self._server.alive, "the server's process ended")
        if self._store is not None:
            _require(self._store.alive, "the store's process ended")

    def _end(self) -> None:
        for process in (self._server, self._store):
            if process is not None:
                process.send(signal.SIGTERM)
                _require(process.wait(15), f"the process does not end: {process.log.name}")


def run_point(
    point: Point,
    vectors: Any,
    launcher: Forking,
    models: Path,
    folder: Path,
    limits: Limits,
) -> Result:
    """Play a point's run; its folder stays if a promise was broken."""
    began = time.monotonic()
    if point.role and point.site not in {one.name for one in launcher.sites}:
        return Result(point, "gone", "", 0.0)
    run = Run(point.store, point, launcher, models, folder, limits)
    try:
        status, detail = ("held" if run.play(vectors) else "not reached"), ""
    except BrokenError as error:
        status, detail = "broken", f"{error}; files: {folder}"
    except Exception as error:  # noqa: BLE001 - what the harness did not expect is a finding, too
        status, detail = "broken", f"{type(error).__name__}: {error}; files: {folder}"
    finally:
        run.kill()
    if status != "broken":
        shutil.rmtree(folder)
    return Result(point, status, detail, time.monotonic() - began)


def _batch(upload_id: str, first: int, last: int) -> pa.RecordBatch:
    start = NUM_ROWS if upload_id == "v" else 0
    numbers = range(start + first, start + last)
    ids = [f"{upload_id}-{row}" for row in range(first, last)]
    texts = _TEXTS.slice(start + first, last - first)
    return pa.record_batch({"id": ids, "text": texts, "n": numbers}, _SCHEMA)


def _array(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks()


def _matrix(table: pa.Table) -> Any:
    """The vectors, [num_rows, dim]."""
    if not table.num_rows:
        return np.zeros((0, 1), np.float32)
    vectors = _array(table, "vector")
    return vectors.flatten().to_numpy().reshape(len(vectors), -1)


def _code(error: Exception) -> str:
    with suppress(ValueError, AttributeError):
        return str(json.loads(error.extra_info)["code"])  # type: ignore[attr-defined]
    return type(error).__name__


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise BrokenError(what)
