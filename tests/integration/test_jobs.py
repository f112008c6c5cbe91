"""Jobs of `fletcher ingest`: files that change, and runs that end at any point."""

from __future__ import annotations

import json
import random
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fletcher
from fletcher.cli import main
from fletcher.client.client import Client
from fletcher.core.command import EmbedCommand
from fletcher.errors import InvalidCommandError, StoreUnavailableError, UploadConflictError
from fletcher.jobs import manifest as manifests
from fletcher.jobs.manifest import MANIFEST, Manifest, read_manifest
from fletcher.runtime import Runtime
from tests.integration.conftest import StartServer


class Job:
    """A folder of input, a dataset of its own, and the command that fills it."""

    def __init__(self, folder: Path, server: str, scan: Callable[[str], pa.Table]) -> None:
        self.input = folder / "in"
        self.input.mkdir()
        self.folder = folder / "job"
        self.dataset = f"d{uuid.uuid4().hex[:8]}"
        self._server = server
        self._scan = scan

    def write(self, name: str, texts: list[str]) -> None:
        if name.endswith(".csv"):
            (self.input / name).write_text("\n".join(["id,text", *(f"{t},{t}" for t in texts), ""]))
        elif name.endswith(".parquet"):
            pq.write_table(pa.table({"id": texts, "text": texts}), self.input / name)
        else:
            lines = [json.dumps({"id": text, "text": text}) for text in texts]
            (self.input / name).write_text("".join(f"{line}\n" for line in lines))

    def command(self, *options: str) -> list[str]:
        target = ["--server", self._server, "--dataset", self.dataset]
        return ["ingest", str(self.input), *target, "--job", str(self.folder), "--json", *options]

    def rows(self) -> list[tuple[str, str]]:
        table = self._scan(self.dataset)
        return sorted(zip(*(table[name].to_pylist() for name in ("id", "text")), strict=True))

    def expected(self) -> list[tuple[str, str]]:
        found = []
        for path in self.input.iterdir():
            if path.suffix == ".csv":
                found += [line.split(",")[0] for line in path.read_text().splitlines()[1:]]
            elif path.suffix == ".parquet":
                found += pq.read_table(path).column("id").to_pylist()
            else:
                found += [json.loads(line)["id"] for line in path.read_text().splitlines()]
        return sorted((text, text) for text in found)


@pytest.fixture(scope="module")
def served(start_server: StartServer) -> Runtime:
    return start_server()


@pytest.fixture
def job(served: Runtime, tmp_path: Path) -> Job:
    return Job(tmp_path, served.address, lambda name: scan(served, name))


def scan(served: Runtime, dataset: str) -> pa.Table:
    service = served._service
    assert service is not None
    _, store = service.delivery.store(None)
    return store.scan(dataset).read_all()


def run(job: Job, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    code = main(job.command(*options))
    out = capsys.readouterr()
    assert code == 0, out.err
    return dict(json.loads(out.out))


def test_changed_added_and_lengthened_files(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write("a.csv", ["a1", "a2"])
    job.write("b.jsonl", ["b1", "b2"])
    job.write("c.parquet", ["c1"])
    assert run(job, capsys)["rows_stored"] == 5
    again = run(job, capsys)
    assert (again["rows_received"], again["rows_skipped"], again["rows_deleted"]) == (5, 5, 0)
    job.write("a.csv", ["a1", "a3", "a4"])
    job.write("b.jsonl", ["b1", "b2", "b3"])
    job.write("d.csv", ["d1"])
    changed = run(job, capsys)
    assert (changed["rows_received"], changed["rows_deleted"], changed["rows_skipped"]) == (8, 2, 3)
    assert job.rows() == job.expected()
    (job.input / "b.jsonl").write_text("")  # and nothing is new
    assert run(job, capsys)["rows_deleted"] == 3
    assert job.rows() == job.expected()


@pytest.mark.parametrize("dedupe", ["id", "text"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_duplicates_of_former_rows_are_not_lost(
    job: Job, capsys: pytest.CaptureFixture[str], name: str, dedupe: str
) -> None:
    job.write(name, ["a1", "a2", "both"])
    job.write("b.csv", ["both", "b1"])
    assert run(job, capsys, "--dedupe", dedupe)["rows_deduplicated"] == 1
    before = job.rows()
    job.write(name, ["a1x", "a2"])
    job.write("c.csv", ["c1"])
    for _ in range(2):
        assert main(job.command("--dedupe", dedupe)) == 2
        error = capsys.readouterr().err
        assert f"{name} has changed since it was stored, and `dedupe` is {dedupe}" in error
        assert job.rows() == before  # nothing was sent or deleted
    job.write(name, ["a1", "a2", "both"])
    run(job, capsys, "--dedupe", dedupe)
    assert [text for _, text in job.rows()] == ["a1", "a2", "b1", "both", "c1"]


def test_a_touched_file_is_read_once(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.write("a.csv", ["a1"])
    run(job, capsys)
    (job.input / "a.csv").touch()
    assert run(job, capsys)["rows_skipped"] == 1
    monkeypatch.setattr("fletcher.readers.files.InputFile.content_hash", None)
    assert run(job, capsys)["rows_skipped"] == 1


def test_files_that_python_sent_are_known(
    job: Job, served: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write("a.csv", ["a1", "a2"])
    job.write("b.jsonl", ["b1"])
    with fletcher.connect(served.address) as client:
        client.ingest(job.input, job.dataset)
    assert run(job, capsys)["rows_skipped"] == 3
    assert job.rows() == job.expected()


def test_a_limit_is_continued_by_the_whole(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write("a.csv", [f"a{n}" for n in range(10)])
    job.write("b.csv", [f"b{n}" for n in range(10)])
    for limit, stored in ((4, 4), (4, 4), (15, 15)):
        assert run(job, capsys, "--limit", str(limit))["rows_stored"] == stored
        assert len(job.rows()) == stored
    assert run(job, capsys)["rows_stored"] == 20
    assert job.rows() == job.expected()


def test_rows_in_another_store_of_the_server_are_known(
    start_server: StartServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = (f"a=lance:{tmp_path / 'a'}", f"b=lance:{tmp_path / 'b'}")
    server = start_server(store=stores)
    job = Job(tmp_path, server.address, lambda _: pa.table({}))
    job.write("a.csv", ["a1"])
    for skipped in (0, 1):
        assert main(job.command("--store", "b")) == 0
        out = capsys.readouterr()
        assert json.loads(out.out)["rows_skipped"] == skipped
        assert "no longer has the rows" not in out.err


def test_a_limit_counts_what_is_stored_between(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write("b.csv", [f"b{n}" for n in range(8)])
    run(job, capsys)
    job.write("a.csv", [f"a{n}" for n in range(5)])
    job.write("c.csv", [f"c{n}" for n in range(5)])
    run(job, capsys, "--limit", "14")
    assert len(job.rows()) == 14


def test_rows_that_are_gone_are_sent_again(
    job: Job, served: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write("a.csv", ["a1"])
    run(job, capsys)
    with fletcher.connect(served.address) as client:
        (name,) = [one.upload_id for one in read_manifest(job.folder).fragments.values()]
        assert client.delete_upload(name, job.dataset) == 1
    assert run(job, capsys)["rows_skipped"] == 0
    assert job.rows() == job.expected()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--prompt", "other"), "prompt"),
        (("--dims", "8"), "dims"),
        (("--dtype", "int8"), "dtype"),
        (("--chunking", "tokens:16"), "chunking"),
        (("--truncate", "start"), "truncate"),
        (("--model", "another"), "model"),
    ],
)
def test_other_options_are_refused(
    job: Job, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], field: str
) -> None:
    job.write("a.csv", ["a1"])
    run(job, capsys)
    assert main(job.command(*options)) == 2
    assert f"`{field}` is {options[1]!r}".replace("'8'", "8") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [(("--mode", "upsert"), "`mode` is upsert"), (("--upload-id", "u"), "`upload_id` names one")],
)
def test_no_job_where_files_are_not_apart(
    job: Job, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], reason: str
) -> None:
    job.write("a.csv", ["a1"])
    assert main(job.command(*options)) == 2
    assert f"`job` cannot be used: {reason}" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_ends_its_fragment_alone(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"text {number}" for number in range(5000)]
    (job.input / "a.txt").write_bytes("\n".join(texts).encode() + b"\n\xff\n")
    job.input.joinpath("b.txt").write_text("b1\n")
    assert main(job.command()) == 1
    out = capsys.readouterr()
    assert "a.txt is left out" in out.err
    assert "line 5001 is not UTF-8" in out.err
    report = json.loads(out.out)
    assert [one["code"] for one in report["failed_files"]] == ["invalid_utf8"]
    assert not report["complete"]
    (job.input / "a.txt").write_text("\n".join(texts))
    report = run(job, capsys)
    assert report["complete"]
    assert sorted(text for _, text in job.rows()) == sorted([*texts, "b1"])


def test_a_file_that_changes_after_the_plan_is_left_out(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.write("a.csv", ["a1"])
    job.write("b.csv", ["b1"])
    put = Client.put

    def changing(*args: Any, **kwargs: Any) -> Any:
        job.write("b.csv", ["b1", "b2"])
        return put(*args, **kwargs)

    monkeypatch.setattr(Client, "put", changing)
    assert main(job.command()) == 1
    assert "b.csv changed while it was read" in capsys.readouterr().err
    assert [text for _, text in job.rows()] == ["a1"]
    monkeypatch.undo()
    run(job, capsys)
    assert job.rows() == job.expected()


def test_the_manifest_says_what_is_stored(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write("a.csv", ["a1", "a2"])
    run(job, capsys)
    assert main(["jobs", "show", str(job.folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["rows"], shown["dataset"]) == ("done", 2, job.dataset)
    (fragment,) = shown["fragments"]
    assert fragment["state"] == "done"
    assert fragment["files"] == [str(job.input / "a.csv")]
    assert main(["jobs", "resume", str(job.folder)]) == 0
    assert json.loads(capsys.readouterr().out)["rows_skipped"] == 2
    assert main(["jobs", "cancel", str(job.folder)]) == 1


def test_a_dry_run_counts_all_rows_and_stores_none(
    job: Job,
    served: Runtime,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fletcher.cli.dry_run.SAMPLE_ROWS", 300)
    job.write("a.csv", [f"a text of {n} words" for n in range(700)])
    job.write("b.jsonl", [f"b {n}" for n in range(500)])
    report = run(job, capsys, "--dry-run", "--price", "3.6")
    assert (report["files"], report["rows"], report["rows_without_text"]) == (2, 1200, 0)
    assert (report["files_known"], report["rows_known"]) == (0, 0)
    assert report["cost"] == pytest.approx(report["seconds"] / 1000, abs=1e-3)
    assert report["columns"] == {"id": "string", "text": "string"}
    assert not job.folder.exists()
    assert run(job, capsys)["rows_stored"] == 1200
    tokens = sum(scan(served, job.dataset)["token_count"].to_pylist())
    assert report["tokens"] == pytest.approx(tokens, rel=0.05)
    job.write("a.csv", ["new"])
    again = run(job, capsys, "--dry-run")
    assert (again["rows"], again["rows_known"], again["rows_to_delete"]) == (1, 500, 700)
    assert len(job.rows()) == 1200
    assert main(job.command("--price", "1")) == 2
    assert "`price` needs --dry-run" in capsys.readouterr().err


def test_a_dry_run_names_types_that_differ(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in (("a", pa.int32()), ("b", pa.float64())):
        table = pa.table({"text": ["one"], "n": pa.array([1], kind)})
        pq.write_table(table, job.input / f"{name}.parquet")
    report = run(job, capsys, "--dry-run", "--columns", "n")
    places = [
        f"{kind} in {job.input}/{name}.parquet" for kind, name in (("int32", "a"), ("double", "b"))
    ]
    assert report["drifts"] == [f"column `n` is {', '.join(places)}; it is stored as double"]


class Killed(BaseException):
    """The end of a run at some point, as by a signal that cannot be handled."""


@contextmanager
def killing(point: int) -> Iterator[list[str]]:
    """Ends a run at its `point`-th step; the list gets the names of the steps."""
    steps: list[str] = []

    def step(name: str) -> None:
        steps.append(name)
        if len(steps) > point:
            raise Killed

    append, put, delete = Manifest.append, Client.put, Client.delete_upload

    def append_killed(self: Manifest, *records: Any) -> None:
        step("before a record")
        append(self, *records)
        step("after a record")

    def append_torn(self: Manifest, *records: Any) -> None:
        try:
            step("within a record")
        except Killed:
            path = self.folder / MANIFEST
            before = path.stat().st_size
            append(self, *records)
            whole = path.stat().st_size
            with path.open("ab") as file:
                file.truncate(before + (whole - before) * 2 // 3)
            raise
        append_killed(self, *records)

    def put_killed(self: Client, *args: Any, **kwargs: Any) -> Any:
        step("before an upload")
        summary = put(self, *args, **kwargs)
        step("after an upload")
        return summary

    def delete_killed(self: Client, *args: Any, **kwargs: Any) -> int:
        step("before a deletion")
        number = delete(self, *args, **kwargs)
        step("after a deletion")
        return number

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "append", append_torn)
        patch.setattr(Client, "put", put_killed)
        patch.setattr(Client, "delete_upload", delete_killed)
        yield steps


def test_a_run_that_ends_at_any_point_is_continued(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fletcher.jobs.plan.MIN_SMALL_FILES", 3)
    chance = random.Random(5)
    seen: set[str] = set()
    point, ended = 0, False
    while not ended:
        for name in ("a.csv", "b.csv", "c.csv", "d.jsonl"):
            job.write(name, [f"{name}-{point}-{n}" for n in range(chance.randrange(1, 4))])
        with (job.input / "e.jsonl").open("a") as file:
            file.write(json.dumps({"id": f"e{point}", "text": f"e{point}"}) + "\n")
        with killing(point) as steps:
            try:
                main(job.command())
                ended = True
            except Killed:
                pass
        seen |= set(steps)
        capsys.readouterr()
        run(job, capsys)
        assert job.rows() == job.expected(), f"{point}: {steps[-1]}"
        assert run(job, capsys)["rows_deleted"] == 0
        point += 1
    assert len(seen) == 7
    assert point > 15


def test_files_that_change_between_killed_runs(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(11)
    for turn in range(25):
        name = f"{chance.choice('abc')}.csv"
        job.write(name, [f"{name}-{turn}-{n}" for n in range(chance.randrange(1, 5))])
        with killing(chance.randrange(12)):
            try:
                main(job.command())
            except Killed:
                continue
    capsys.readouterr()
    run(job, capsys)
    assert job.rows() == job.expected()


def test_an_upload_is_deleted_and_can_be_sent_again(served: Runtime) -> None:
    table = pa.table({"id": ["1", "2"], "text": ["one", "two"]})
    with fletcher.connect(served.address) as client:
        for name in ("u", "u2", "u_", "U"):
            client.put(table, EmbedCommand(dataset="del", upload_id=name, durability="store"))
        for _ in range(2):
            assert client.delete_upload("u", "del") == 2
            assert client.delete_upload("u", "del") == 0
            assert client.upload_status("u", "del")["ranges"] == []
            again = client.put(table, EmbedCommand(dataset="del", upload_id="u"), resume=True)
            assert (again.rows_received, again.rows_skipped, again.complete) == (2, 0, True)
        assert scan(served, "del").num_rows == 8
        assert client.delete_upload("u", "missing") == 0
        with pytest.raises(InvalidCommandError, match="`upload_id` is missing"):
            client._connection.action("delete_upload", {"dataset": "del"})
        with pytest.raises(InvalidCommandError, match="`mode` has no meaning in delete_upload"):
            body = {"dataset": "del", "upload_id": "u", "mode": "append"}
            client._connection.action("delete_upload", body)


def test_an_open_upload_is_not_deleted(served: Runtime) -> None:
    asked: list[type[Exception]] = []

    def batches() -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict({"id": ["1"], "text": ["one"]})
        with fletcher.connect(served.address) as other:
            for _ in range(50):
                try:
                    other.delete_upload("open", "open")
                except (UploadConflictError, StoreUnavailableError) as error:
                    asked.append(type(error))
                    break
        yield pa.RecordBatch.from_pydict({"id": ["2"], "text": ["two"]})

    with fletcher.connect(served.address) as client:
        options = EmbedCommand(dataset="open", upload_id="open", durability="store")
        schema = pa.schema({"id": pa.utf8(), "text": pa.utf8()})
        summary = client.put(pa.RecordBatchReader.from_batches(schema, batches()), options)
    assert summary.rows_stored == 2
    assert asked == [UploadConflictError]


def test_dedupe_forgets_deleted_rows(served: Runtime) -> None:
    table = pa.table({"id": ["1"], "text": ["one"]})
    with fletcher.connect(served.address) as client:
        for name, stored in (("a", 1), ("b", 0)):
            options = EmbedCommand(
                dataset="dedupe", upload_id=name, dedupe="id", durability="store"
            )
            assert client.put(table, options).rows_stored == stored
        assert client.delete_upload("a", "dedupe") == 1
        options = EmbedCommand(dataset="dedupe", upload_id="c", dedupe="id", durability="store")
        assert client.put(table, options).rows_stored == 1


def test_a_second_run_is_refused(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write("a.csv", ["a1"])
    with manifests.Manifest(job.folder):
        assert main(job.command()) == 2
    assert "is running in another process" in capsys.readouterr().err
    shutil.rmtree(job.folder)
    run(job, capsys)
