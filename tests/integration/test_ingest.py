"""`fletcher ingest` of the shipped sample, into LanceDB and into a store server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import flight

from fletcher.models.bundle.bundle import ModelBundle
from tests.doubles.longbow import LongbowDouble
from tests.integration.flight_calls import TIMEOUT, action
from tests.integration.numbered import stored
from tests.integration.processes import (
    FLETCHER,
    Place,
    clean_environ,
    eventually,
    is_steady,
    serving,
)

SAMPLE = Path(__file__).parents[2] / "examples" / "data" / "debian-sample.parquet"


@pytest.fixture(scope="module")
def sample() -> dict[str, str]:
    """Texts by id."""
    table = pq.read_table(SAMPLE)
    return dict(zip(*(table.column(name).to_pylist() for name in ("package", "body")), strict=True))


@pytest.fixture(scope="module")
def place(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tiny_home, tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a `fletcher store`."""
    argv = [sys.executable, "-c", FLETCHER, "store", "--port", "0", "--meta-port", "0"]
    with serving([*argv, "--path", str(tmp_path_factory.mktemp("store"))]) as server:
        yield server.address
        assert server.end() == 0


def run_ingest(place: Place, store: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-c", FLETCHER, "ingest", *map(str, options)),
            *("--dataset", "debian", "--store", store, "--json"),
            *("--home", str(place.home), "--model", place.model, "--backend", "null"),
        ],
        capture_output=True,
        text=True,
        env=clean_environ(),
        timeout=90,
        check=False,
    )


def ingest(place: Place, store: str) -> dict[str, object]:
    """Runs the command; its JSON summary."""
    done = run_ingest(place, store, SAMPLE, "--text", "body", "--id", "package")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def assert_sample(table: pa.Table, sample: dict[str, str]) -> None:
    ids, texts = (table.column(name).to_pylist() for name in ("id", "text"))
    assert len(ids) == len(sample)
    assert dict(zip(ids, texts, strict=True)) == sample
    assert table.column("vector").null_count == 0


def test_twice_into_lancedb_is_once(
    place: Place, tiny_bundle: ModelBundle, sample: dict[str, str]
) -> None:
    from fletcher.stores.address import open_store

    address = f"lance:{place.vectors}"
    summaries, tables = [], []
    for _ in range(2):
        summaries.append(ingest(place, address))
        store = open_store(address)
        tables.append(store.scan("debian").read_all().sort_by("id"))
        store.close()
    for summary in summaries:
        assert summary["complete"] is True
        assert summary["dataset"] == "debian"
        assert summary["model"] == f"null-{tiny_bundle.qualified_name}"
        assert summary["rows_received"] == summary["rows_stored"] == len(sample)
        assert summary["rows_failed"] == 0
        assert summary["errors"] == []
    assert summaries[0]["upload_id"] == summaries[1]["upload_id"]
    assert_sample(tables[0], sample)
    assert tables[1].equals(tables[0])


def test_into_a_store_server_and_back_with_plain_pyarrow(
    place: Place, store: str, sample: dict[str, str]
) -> None:
    for _ in range(2):
        summary = ingest(place, store)
        assert summary["complete"] is True
        assert summary["rows_stored"] == len(sample)
    with flight.connect(store) as client:
        ticket = flight.Ticket(json.dumps({"name": "debian"}).encode())
        table = client.do_get(ticket, TIMEOUT).read_all()
        assert_sample(table, sample)

        # The null backend's vectors are as good as orthogonal, so a row finds itself.
        vectors = table.column("vector").combine_chunks()
        vectors = vectors.flatten().to_numpy().reshape(table.num_rows, -1).astype(np.float32)
        for row in (0, 999, 1999):
            search = {"dataset": "debian", "vector": vectors[row].tolist(), "k": 3}
            action = flight.Action("VectorSearch", json.dumps(search).encode())
            (result,) = client.do_action(action, TIMEOUT)
            found = pa.ipc.open_stream(result.body).read_all()
            assert found.num_rows == 3
            scores = found.column("score").to_pylist()
            assert scores[0] == pytest.approx(1, abs=1e-2)
            assert scores[0] > scores[1] + 0.05
            assert found.column("id")[0].as_py() == table.column("id")[row].as_py()


def test_a_killed_ingest_sends_only_the_rest(place: Place) -> None:
    lines = [json.dumps({"id": n, "text": f"{n} " * 20}) + "\n" for n in range(40_000)]
    with serving(place.argv("--group-rows", "1000", "--max-journal", "256MiB")) as server:
        argv = [
            *(sys.executable, "-c", FLETCHER, "ingest", "-", "--format", "jsonl", "--json"),
            *("--dataset", "resumed", "--upload-id", "nightly", "--server", server.address),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with (
            flight.connect(server.address) as client,
            subprocess.Popen(argv, env=clean_environ(), text=True, **pipes) as killed,  # type: ignore[call-overload]
        ):
            assert killed.stdin is not None
            killed.stdin.writelines(lines[:30_000])  # and no end
            killed.stdin.flush()

            def durable() -> int:
                body = {"upload_id": "nightly", "dataset": "resumed"}
                return int(action(client, "upload_status", body)["rows_durable"])

            eventually(lambda: durable() > 0, "some rows are in the store")
            killed.kill()
            killed.wait(30)

            def is_gone() -> bool:
                stats = action(client, "stats")
                return not (stats["fletcher.streams.open"] or stats["memory"]["used_bytes"])

            eventually(is_gone, "it is gone, and its rows have left the queues")
            eventually(lambda: is_steady(durable), "the group in the journal's hands is durable")
            before = durable()
        done = subprocess.run(
            argv,
            input="".join(lines),
            capture_output=True,
            text=True,
            env=clean_environ(),
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["complete"] is True
        assert summary["upload_id"] == "nightly"
        assert summary["rows_received"] == summary["rows_stored"] == len(lines)
        assert 0 < summary["rows_skipped"] <= before < len(lines)
        assert summary["rows_skipped"] + summary["rows_deduplicated"] == before
        assert server.end() == 0
    table = stored(place.vectors, "resumed")
    assert table.column("id").to_pylist() == list(range(len(lines)))


def test_a_store_that_goes_away_between_two_files_is_waited_for(
    place: Place, tmp_path: Path
) -> None:
    class Blinking(LongbowDouble):
        asked = 0

        def read(self, ticket: bytes) -> Any:
            if self.tables:
                self.asked += 1
                if self.asked <= 2:
                    raise flight.FlightUnavailableError("shutting down")
            return super().read(ticket)

    for file in ("one.jsonl", "two.jsonl"):
        lines = [json.dumps({"id": f"{file}-{row}", "text": "of it"}) for row in range(3)]
        (tmp_path / file).write_text("\n".join(lines))
    with Blinking() as double:
        done = run_ingest(place, double.address, tmp_path)
        assert done.returncode == 0, done.stderr
        assert double.asked > 2
        assert len(set(double.table("debian")["id"].to_pylist())) == 6
        assert double.num_rows("debian") == 6


def test_a_store_that_is_away_at_the_start_ends_the_command_at_once(
    place: Place, tmp_path: Path
) -> None:
    with LongbowDouble() as double:
        double.kill()
        # The model is not loaded for it: here it could not be.
        nowhere = Place(tmp_path / "home", place.vectors, "missing")
        done = run_ingest(nowhere, double.address, SAMPLE, "--text", "body")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert double.address in line
    assert "check its address and that it runs" in line


def scan(address: str) -> pa.Table:
    from fletcher.stores.address import open_store

    store = open_store(address)
    try:
        return store.scan("debian").read_all()
    finally:
        store.close()


def test_a_bad_line_ends_the_command_and_is_left_out_by_the_next(
    place: Place, tmp_path: Path
) -> None:
    path, rejects = tmp_path / "in.jsonl", tmp_path / "rejects.jsonl"
    rows = [json.dumps({"id": f"r{number}", "text": f"text {number}"}) for number in range(6)]
    path.write_text("\n".join([*rows[:3], rows[3][:-2], *rows[4:]]))
    store = f"lance:{tmp_path / 'vectors'}"
    failed = run_ingest(place, store, path)
    assert failed.returncode == 2
    assert "line 4" in failed.stderr
    skipping = ("--on-bad-row", "skip", "--rejects", rejects)
    done = run_ingest(place, store, path, *skipping)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["rows_received"], report["rows_rejected"]) == (5, 1)
    refused = run_ingest(place, store, path, *skipping)
    assert refused.returncode != 0
    assert "exists" in refused.stderr
    (rejected,) = map(json.loads, rejects.read_text().splitlines())
    assert (rejected["row"], rejected["line"]) == (4, rows[3][:-2])
    repaired = tmp_path / "repaired.jsonl"
    repaired.write_text(rejected["line"] + '"}')
    assert run_ingest(place, store, repaired).returncode == 0
    assert sorted(scan(store).column("id").to_pylist()) == [f"r{number}" for number in range(6)]


def test_rows_before_a_bad_line_are_stored_once(place: Place, tmp_path: Path) -> None:
    """The types of plain text need no second reading, so rows before the line are sent."""
    path, store = tmp_path / "in.txt", f"lance:{tmp_path / 'vectors'}"
    texts = [f"text {number}" for number in range(9000)]
    path.write_bytes(
        "\n".join([*texts[:8999], "", texts[8999]]).encode().replace(b"\n\n", b"\n\xff\n")
    )
    failed = run_ingest(place, store, path)
    assert failed.returncode == 1
    assert "line 9000" in failed.stderr
    done = run_ingest(place, store, path, "--on-bad-row", "skip")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows_rejected"] == 1
    assert sorted(scan(store).column("text").to_pylist()) == sorted(texts)


def test_a_longbow_refuses_a_changed_file_before_anything_is_sent(
    place: Place, tmp_path: Path
) -> None:
    path, other = tmp_path / "a.csv", tmp_path / "b.csv"
    path.write_text("id,text\na,one\n")
    with LongbowDouble() as longbow:
        store = longbow.address
        job = ("--job", tmp_path / "job")
        assert run_ingest(place, store, path, *job).returncode == 0
        path.write_text("id,text\na,two words\n")
        other.write_text("id,text\nb,new\n")
        refused = run_ingest(place, store, path, other, *job)
        assert refused.returncode == 2
        assert f"{path} has changed since it was stored" in refused.stderr
        assert run_ingest(place, store, other, *job).returncode == 0
