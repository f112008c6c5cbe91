"""Random sequences of commands, uploads and restarts with a Longbow.

A seed gives the sequence. Columns, types, widths and modes change from upload to upload. After each
step Longbow starts, the rows that were reported as stored are there once and unchanged, and what
was refused has an error that says why.
"""

from __future__ import annotations

import json
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import flight

from fletcher.client import PutSummary, TransferOptions, connect
from fletcher.core.schema import parse_batch_key
from fletcher.delivery.journal.root import journal_folders
from fletcher.delivery.journal.segment import REJECTED, WAITING, Segment, read_segments
from fletcher.errors import RequestError
from fletcher.stores.address import open_store
from fletcher.stores.exact_search import APPROXIMATE
from fletcher.stores.filter_parser import parse_filter
from tests.doubles.table_values import plain, same
from tests.faults.launching import Launcher, Process
from tests.faults.longbow_servers import LongbowServer
from tests.faults.longbow_uploads import DATASETS, Sent, Uploads
from tests.faults.schedules import free_port
from tests.faults.stories import Story, told
from tests.integration.processes import eventually

_STEPS = {
    "put": 5,
    "ingest by the server": 3,
    "ingest": 2,
    "send again": 3,
    "send no rows": 2,
    "another client": 2,
    "search": 3,
    "kill longbow": 3,
    "end longbow": 2,
    "kill fletcher": 1,
    "end fletcher": 1,
}
_WAIT_S = 120.0
_CALL = flight.FlightCallOptions(timeout=60)
_TRANSFER = TransferOptions(max_retries=30, backoff_s=0.05, max_backoff_s=0.5)
_CONSTANTS: dict[str, Any] = {
    "fletcher.delivery.delivery.DeliveryTiming": {
        "segment_idle_s": 0.1,
        "committer_linger_s": 0.2,
    },
}

_CONFIG = """
home = "{home}"
store = "{store}"
model = "tiny"
backend = "null"
allow_undeclared = true
tokenizer_workers = 1
drain_timeout = "20s"
"""


@dataclass(frozen=True)
class Sequence:
    """The steps of a seed; what a step sends is drawn when it comes."""

    seed: int
    steps: tuple[str, ...]


@dataclass
class SequenceReport:
    """Counts of one sequence.

    Attributes:
        steps: By kind.
        ends: Uploads by their end: stored, or refused.
        num_rows: Rows that are stored in the end.
        seconds: Time that it took.
    """

    steps: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0
    seconds: float = 0.0

    @property
    def counts(self) -> Counter[str]:
        """All that is counted over many sequences."""
        return self.steps + self.ends


def draw(seed: int) -> Sequence:
    """The sequence of a seed."""
    chance = random.Random(f"{seed} sequence")
    steps = chance.choices(list(_STEPS), list(_STEPS.values()), k=chance.randint(6, 12))
    return Sequence(seed, tuple(steps))


def run(
    plan: Sequence,
    start_longbow: Callable[[Path], LongbowServer],
    launcher: Launcher,
    models: Path,
    folder: Path,
    constants: dict[str, Any],
) -> SequenceReport:
    """Carry out a sequence.

    Args:
        plan: The sequence.
        start_longbow: Starts a Longbow with files in a folder.
        launcher: Starts Fletcher's processes.
        models: Folder of bundles with the model `tiny`.
        folder: Empty folder; deleted unless a promise was broken.
        constants: Changed constants of Fletcher's modules; `QUICK` for the stand-in.

    Raises:
        ScheduleError: A promise was broken.
    """
    again = f"--longbow-sequences 1 --first {plan.seed}"
    with (
        told(plan.seed, plan, again, folder) as story,
        _Run(plan, start_longbow, launcher, models, folder, story) as one,
    ):
        return one.run(constants)


class _Run:
    """One sequence and its processes."""

    def __init__(
        self,
        plan: Sequence,
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
        self._chance = random.Random(plan.seed)
        self._uploads = Uploads(self._chance)
        self._foreign: Counter[str] = Counter()
        self._vectors: dict[tuple[int, str, str], Any] = {}
        self._report = SequenceReport()
        self._home = folder / "home"
        self._home.mkdir(parents=True)
        (self._home / "models").symlink_to(models)
        self._longbow = start_longbow(folder / "longbow")
        self._store = f"grpc://127.0.0.1:{self._longbow.data_port}?meta={self._longbow.meta_port}"
        self._config = folder / "fletcher.toml"
        self._config.write_text(_CONFIG.format(home=self._home, store=self._store))
        self._port = free_port()
        self._address = f"grpc://127.0.0.1:{self._port}"
        self._server: Process

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            stack.callback(self._launcher.end_all)
            stack.callback(self._longbow.close)

    def run(self, constants: dict[str, Any]) -> SequenceReport:
        self._constants = _CONSTANTS | constants
        self._start_server()
        for number, step in enumerate((*self._plan.steps, "end fletcher", "kill longbow")):
            self._story.tell(f"step {number}: {step}")
            self._report.steps[step] += 1
            self._take(step)
            self._check()
        log = self._server.output()
        assert "Traceback" not in log, "a traceback in the server's log"
        rejected = list(self._home.glob(f"journal/*/*/*{REJECTED}"))
        assert not rejected, f"the store refused rows for good: {rejected}"
        self._report.seconds = self._story.seconds
        return self._report

    def _take(self, step: str) -> None:
        match step:
            case "put":
                self._send(self._uploads.draw(), self._put)
            case "ingest by the server" | "ingest":
                sent = self._uploads.draw()
                sent.is_file = True
                way = self._ingest if step == "ingest" else self._ingest_by_server
                self._send(sent, way)
            case "send again":
                if self._uploads.sent:
                    sent = self._chance.choice(self._uploads.sent)
                    ways = [self._ingest_by_server, self._ingest] if sent.is_file else [self._put]
                    self._send(sent, self._chance.choice(ways))
            case "send no rows":
                self._send_no_rows()
            case "another client":
                self._write_as_another_client()
            case "search":
                self._search()
            case "kill longbow" | "end longbow":
                (self._longbow.kill if step == "kill longbow" else self._longbow.end)()
                assert self._longbow.start(), "Longbow does not start"
            case "kill fletcher":
                self._server.kill()
                self._start_server()
            case "end fletcher":
                self._server.send(signal.SIGTERM)
                assert self._server.wait(60), "the server does not end"
                self._start_server()

    def _start_server(self) -> None:
        log = self._folder / "server.log"
        argv = ["--config", str(self._config), "--port", str(self._port)]
        self._server = self._launcher.start_server(
            "serve", log, argv=argv, constants=self._constants
        )

    # Uploads

    def _send(self, sent: Sent, way: Callable[[Sent], PutSummary | str]) -> None:
        """Send an upload, and check how it ends."""
        self._embed(sent)
        answer = way(sent)
        shown = f"{sent.upload_id} to {sent.dataset} by {way.__name__}: {sent.shape} {sent.options}"
        self._story.tell(f"{shown}, {sent.table.num_rows} rows: {answer}")
        num_good = sum(map(sent.is_good, range(sent.table.num_rows)))
        if isinstance(answer, str):
            self._report.ends["refused"] += 1
            _check_message(answer)
            assert not sent.is_promised, f"what was stored is refused: {answer}"
            # A reader of files refuses rows without an id, which a server leaves out.
            is_whole = num_good == sent.table.num_rows
            must = self._uploads.must_be_taken(sent) and is_whole
            assert not must, f"nothing speaks against {sent.shape}: {answer}"
            return
        self._report.ends["stored"] += 1
        assert not sent.is_refused, f"{sent.options} is taken: {answer}"
        assert answer.complete, f"not complete: {answer}"
        assert answer.rows_failed <= sent.table.num_rows - num_good, f"rows failed: {answer}"
        assert not answer.rows_deduplicated or "dedupe" in sent.options, f"{answer}"
        self._uploads.note_promised(sent)
        if self._chance.random() < 0.3:
            self._take("kill longbow")

    def _embed(self, sent: Sent) -> None:
        """Ask for the vectors that have to be stored."""
        rows = [row for row in range(sent.table.num_rows) if sent.is_good(row)]
        texts = [sent.table["text"][row].as_py() for row in rows]
        with connect(self._address) as client:
            vectors = client.embed(texts, dims=sent.shape.dims, prompt=sent.shape.prompt)
        for row, vector in zip(rows, vectors, strict=True):
            number = sent.table["n"][row].as_py()
            self._vectors[number, sent.upload_id, sent.dataset] = vector

    def _put(self, sent: Sent) -> PutSummary | str:
        try:
            with connect(self._address, transfer=_TRANSFER) as client:
                return client.put(sent.table, sent.command, resume=True)
        except RequestError as error:
            return f"{error.code}: {error.message}"

    def _ingest_by_server(self, sent: Sent) -> PutSummary | str:
        return self._command(sent, "--server", self._address)

    def _ingest(self, sent: Sent) -> PutSummary | str:
        return self._command(sent, "--config", str(self._config))

    def _command(self, sent: Sent, *where: str) -> PutSummary | str:
        status, output = self._run_command(*sent.argv(self._folder), *where)
        last = output.splitlines()[-1] if output else ""
        if status in ("1", "2"):
            assert last.startswith("fletcher ingest:"), output
            return output
        assert status == "0", output
        found = json.loads(last)
        names = set(PutSummary.__dataclass_fields__)
        return PutSummary(**{"rows_durable": 0} | {n: found[n] for n in names & set(found)})

    def _run_command(self, *argv: str) -> tuple[str, str]:
        """Exit status and output of a command."""
        log, status = self._folder / "commands.log", self._folder / "status"
        log.touch()
        before = len(log.read_text())
        process = self._launcher.start(
            "command", log, argv=argv, status=str(status), constants=self._constants
        )
        assert process.wait(_WAIT_S), f"{argv} does not end"
        return status.read_text(), process.output()[before:]

    def _send_no_rows(self) -> None:
        """Calls that store nothing, whatever is there."""
        sent = self._uploads.draw()
        self._uploads.forget(sent)
        nothing = sent.table.slice(0, 0)
        if self._chance.random() < 0.5:  # rows that all fail
            place = sent.table.schema.get_field_index("text")
            texts = pa.nulls(sent.table.num_rows, pa.utf8())
            nothing = sent.table.set_column(place, "text", texts)
        sent.table = nothing
        ways = [self._put, self._put, self._ingest_by_server, self._ingest]
        answer = self._chance.choice(ways)(sent)
        self._story.tell(f"no rows to {sent.dataset}, {sent.shape}: {answer}")
        if isinstance(answer, str):
            _check_message(answer)
        else:
            assert not answer.rows_stored, answer
        with flight.connect(self._address) as client:
            for dataset in DATASETS:
                path = flight.FlightDescriptor.for_path(dataset)
                for call in (client.get_schema, client.get_flight_info):
                    with suppress(pa.ArrowKeyError, flight.FlightInternalError):
                        assert "vector" in call(path, _CALL).schema.names

    def _write_as_another_client(self) -> None:
        """Declare columns, or write rows, by Longbow's own DoPut."""
        dataset = self._chance.choice(DATASETS)
        table = self._longbow.table(dataset)
        drawn = self._uploads.draw()
        self._uploads.forget(drawn)
        self._uploads.touched.add(dataset)
        batch = _foreign_rows(drawn, table, alike=self._chance.random() < 0.5)
        rows = [batch] if self._chance.random() < 0.5 else []
        with flight.connect(f"grpc://127.0.0.1:{self._longbow.data_port}") as client:
            path = flight.FlightDescriptor.for_path(dataset)
            try:
                writer, reader = client.do_put(path, batch.schema, _CALL)
                with writer:
                    for one in rows:
                        writer.write_batch(one)
                    writer.done_writing()
                    reader.read()
            except pa.ArrowInvalid as error:
                self._story.tell(f"another client is refused: {error}"[:300])
                return
        self._foreign.update({dataset: sum(one.num_rows for one in rows)})
        self._story.tell(f"another client: {dataset}, {len(rows)} batches of {batch.schema}")
        if rows:
            wanted = self._foreign[dataset]
            has_rows = lambda: _num_foreign(self._longbow.table(dataset)) == wanted  # noqa: E731
            eventually(has_rows, f"{dataset} has rows of another client", 30)

    # Checks

    def _check(self) -> None:
        """Check what was reported as stored."""
        assert self._server.alive, "the server has ended"
        eventually(lambda: not self._num_waiting(), "the journal is empty", _WAIT_S)
        tables = {dataset: self._longbow.table(dataset) for dataset in DATASETS}
        for dataset, table in tables.items():
            found = Counter() if table is None else self._check_rows(dataset, table)
            for sent in self._uploads.sent:
                if sent.dataset == dataset and sent.is_promised:
                    self._check_upload(sent, found)
        self._report.num_rows = sum(one.num_rows for one in tables.values() if one is not None)

    def _check_rows(self, dataset: str, table: pa.Table) -> Counter[tuple[str, int]]:
        """Compare each row with what was sent; returns how often each row is there."""
        sent = {one.upload_id: one for one in self._uploads.sent if one.dataset == dataset}
        rows = {
            name: {n: row for row, n in enumerate(one.table["n"].to_pylist())}
            for name, one in sent.items()
        }
        found: Counter[tuple[str, int]] = Counter()
        for row in _rows(table):
            key = parse_batch_key(row.get("batch_key") or "")
            if key is None:
                continue
            upload = key[0]
            assert upload in sent, f"{dataset} has a row of {upload}, which was never sent to it"
            number = row["n"]
            found[upload, number] += 1
            wanted = sent[upload].values(rows[upload][number])
            wrong = {
                name: (value, row.get(name))
                for name, value in wanted.items()
                if not same(value, row.get(name))
            }
            assert not wrong, f"row {number} of {upload} has other values: {wrong}"
            vector = self._vectors[number, upload, dataset]
            assert np.allclose(row["vector"], vector, atol=1e-6), f"row {number}: another vector"
        assert _num_foreign(table) <= self._foreign[dataset]
        return found

    def _check_upload(self, sent: Sent, found: Counter[tuple[str, int]]) -> None:
        counts = Counter(
            {
                number: found[sent.upload_id, number]
                for row, number in enumerate(sent.table["n"].to_pylist())
                if sent.is_good(row)
            }
        )
        wrong = {number: count for number, count in counts.items() if count != 1}
        assert not wrong, f"rows of {sent.upload_id} are stored that often: {wrong}"

    def _num_waiting(self) -> int:
        """Groups in the journal that are not stored."""
        return sum(
            not group.settled
            for _, _, folder in journal_folders(self._home / "journal")
            for _, segment in read_segments(folder.glob(f"*{WAITING}"))
            for group in (segment.groups if isinstance(segment, Segment) else ())
        )

    def _search(self) -> None:
        """Search for the text of a row, and compare the result with all rows."""
        stored = [one for one in self._uploads.sent if one.is_promised and one.is_good(0)]
        if not stored:
            return
        sent = self._chance.choice(stored)
        number = sent.table["n"][0].as_py()
        vector = np.asarray(self._vectors[number, sent.upload_id, sent.dataset], np.float32)
        table = self._longbow.table(sent.dataset)
        assert table is not None
        text, keep = _condition(self._chance, table)
        met = table.filter(keep)
        vectors = np.stack(met["vector"].to_numpy()) if met.num_rows else np.zeros((0, len(vector)))
        best = np.sort(vectors @ vector)[::-1][:5]
        with closing(open_store(self._store, timeout_s=20)) as store:
            schema = store.read_schema(sent.dataset)
            assert schema is not None
            filters = [parse_filter(text, schema)] if text else []
            found = store.search(sent.dataset, vector, k=5, columns=["n"], filters=filters)
            info = store.dataset(sent.dataset)
        self._story.tell(f"search in {sent.dataset} where {text!r}: {found.to_pylist()}")
        assert info is not None
        assert info.num_rows == table.num_rows, f"{info.num_rows} of {table.num_rows} rows"
        assert set(found["n"].to_pylist()) <= set(met["n"].to_pylist())
        if APPROXIMATE not in (found.schema.metadata or {}):
            assert np.allclose(found["score"], best, atol=1e-5), f"{best} for {text!r}"
        if self._chance.random() < 0.3:
            asked = sent.table["text"][0].as_py()
            argv = ["search", asked, "--dataset", sent.dataset, "--store", self._store]
            argv += ["--server", self._address, "--prompt", sent.shape.prompt, "--json"]
            status, output = self._run_command(*argv)
            assert status == "0", output
            first = json.loads(output.splitlines()[-1 if "\n" not in output else 0])
            assert first["score"] > 1 - 1e-5, output


def _check_message(message: str) -> None:
    """Check that an error says what is wrong."""
    assert "Traceback" not in message, message
    assert not re.search(r"unexpected \w+Error|internal|Flight error", message), message
    assert "`" in message, message


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    columns = [[plain(one) for one in column] for column in table.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(table.schema.names, values, strict=True))


def _num_foreign(table: pa.Table | None) -> int:
    if table is None:
        return 0
    own = "batch_key" in table.schema.names and pc.sum(pc.is_valid(table["batch_key"])).as_py()
    return int(table.num_rows - (own or 0))


def _foreign_rows(sent: Sent, table: pa.Table | None, *, alike: bool) -> pa.RecordBatch:
    """Rows as a plain client of Longbow sends them; `alike`: with the table's columns."""
    numbers = sent.table["n"]
    size = len(numbers)
    dims = sent.shape.dims if table is None else table.schema.field("vector").type.list_size
    vectors = np.random.default_rng(size).random((size, dims), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    own = {
        "id": pa.array([f"foreign {n}" for n in numbers.to_pylist()]),
        "vector": pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), dims),
        "timestamp": pa.array(range(size), pa.timestamp("ns")),
        "n": numbers.combine_chunks(),
        **{name: sent.table[name].combine_chunks() for name, _ in sent.shape.columns},
    }
    if table is None:
        return pa.record_batch(own)
    if not alike:
        names = [name for name in own if name not in table.schema.names or name == "vector"]
        return pa.record_batch({name: own[name] for name in ("n", *names)})
    columns = [
        own[field.name]
        if field.name in own and own[field.name].type == field.type
        else pa.nulls(size, field.type)
        for field in table.schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=table.schema)


def _condition(chance: random.Random, table: pa.Table) -> tuple[str, Any]:
    """A filter, and the rows of a table that meet it."""
    n = chance.choice(table["n"].to_pylist())
    column = table["n"]
    less, more = pc.less(column, n), pc.greater_equal(column, n)
    choices = [
        ("", pc.is_valid(column)),
        (f"n < {n}", less),
        (f"n >= {n}", more),
        (f"n = {n} or n < {n - 3}", pc.or_(pc.equal(column, n), pc.less(column, n - 3))),
        (f"n in ({n}, {n + 1})", pc.is_in(column, pa.array([n, n + 1]))),
        (f"not n = {n}", pc.not_equal(column, n)),
        ("n >= 0 and batch_key is not null", pc.is_valid(table["batch_key"])),
    ]
    return chance.choice(choices)
