"""The commands as people call them, against a real server with the null backend."""

from __future__ import annotations

import datetime as dt
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fletcher.cli import main
from fletcher.core.schema import VectorSpec, output_schema
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.stores.address import open_store
from tests.doubles.proxy import Proxy

TEXTS = [f"row number {number} of the file" for number in range(300)]


@dataclass(frozen=True)
class Done:
    """What a command that was run left behind."""

    code: int
    out: str
    err: str


Call = Callable[..., Done]


@dataclass(frozen=True)
class Place:
    """A folder with a model, a file of text and an environment of its own."""

    folder: Path
    environ: dict[str, str]

    @property
    def file(self) -> Path:
        return self.folder / "rows.parquet"

    @property
    def store(self) -> str:
        return f"lance:{self.folder / 'vectors'}"

    def command(self, *argv: str) -> list[str]:
        code = "import sys; from fletcher.cli import main; sys.exit(main())"
        return [sys.executable, "-c", code, *argv]

    def run(self, *argv: str, stdin: str = "") -> Done:
        """Runs a command in a process of its own."""
        done = subprocess.run(
            self.command(*argv),
            check=False,
            input=stdin,
            capture_output=True,
            text=True,
            env=self.environ,
            timeout=120,
        )
        return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def place(tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("cli")
    home = folder / "home"
    home.mkdir()
    (home / "models").symlink_to(tiny_bundle.folder.parent)
    environ = {name: text for name, text in os.environ.items() if "FLETCHER_" not in name}
    environ |= {
        "FLETCHER_HOME": str(home),
        "FLETCHER_MODEL": tiny_bundle.name,
        "FLETCHER_BACKEND": "null",
    }
    table = {"body": TEXTS, "name": [f"n{n}" for n in range(300)], "size": list(range(300))}
    pq.write_table(pa.table(table), folder / "rows.parquet")
    return Place(folder, environ)


@pytest.fixture
def call(place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process, which has imported everything already."""
    for name in place.environ:
        monkeypatch.setenv(name, place.environ[name])

    def run(*argv: str) -> Done:
        gc.collect()  # a call that an earlier test left open says so when it is deleted
        capfd.readouterr()
        code = main(argv)
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[tuple[str, str]]:
    """(address, token file) of a running `fletcher serve`; it must end well on SIGTERM."""
    tokens = place.folder / "tokens"
    tokens.write_text("secret\n", encoding="utf-8")
    argv = ("serve", "--port", "0", "--store", place.store, "--token-file", str(tokens))
    process = subprocess.Popen(
        place.command(*argv), stdout=subprocess.PIPE, text=True, env=place.environ
    )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on grpc://127.0.0.1:")
            yield line.split()[-1], str(tokens)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert process.stdout.read() == ""
        finally:
            process.kill()


@pytest.fixture(scope="module")
def ingested(place: Place, server: tuple[str, str]) -> dict[str, object]:
    """The summary of the file's ingestion."""
    done = place.run(*ingest_argv(place, server), "--json")
    assert (done.code, done.err) == (0, "")
    summary: dict[str, object] = json.loads(done.out)
    return summary


def ingest_argv(place: Place, server: tuple[str, str]) -> list[str]:
    columns = ["--text", "body", "--id", "name", "--columns", "size"]
    return ["ingest", str(place.file), *columns, "--dataset", "rows", *at(server)]


def at(server: tuple[str, str]) -> list[str]:
    return ["--server", server[0], "--token-file", server[1]]


def test_ingest_into_a_server(
    place: Place, ingested: dict[str, object], tiny_bundle: ModelBundle
) -> None:
    assert ingested["complete"] is True
    assert (ingested["rows_received"], ingested["rows_stored"]) == (300, 300)
    assert (ingested["rows_failed"], ingested["errors"]) == (0, [])
    assert ingested["dataset"] == "rows"
    assert ingested["model"] == f"null-{tiny_bundle.qualified_name}"


def test_the_same_again_stores_nothing_twice(
    place: Place, call: Call, server: tuple[str, str], ingested: dict[str, object]
) -> None:
    done = call(*ingest_argv(place, server))
    assert done.code == 0
    assert done.out.startswith("300 rows received, 300 stored, 0 failed, 300 were there already")
    assert ", 0 rows/s\n" in done.out
    assert f"upload   {ingested['upload_id']}\n" in done.out
    doctor = call("doctor", "--json", "--store", place.store)
    (store,) = [one for one in json.loads(doctor.out)["findings"] if one["part"] == "stores"]
    assert store["value"].endswith("1 datasets, 300 rows")


def test_failed_rows_are_told_from_those_without_a_vector(
    call: Call, server: tuple[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": null}\n', encoding="utf-8")
    argv = ("ingest", str(file), "--dataset", "some", *at(server))
    done = call(*argv)
    assert done.code == 0
    assert done.out.startswith("2 rows received, 2 stored, 1 failed (stored without a vector)\n")
    assert "row 1 (id b): invalid_command: `text` is null" in done.out
    assert "2 stored, 1 failed (stored without a vector), 2 were there al" in call(*argv).out
    done = call(*argv, "--mode", "delta")
    assert done.out.startswith("2 rows received, 0 stored, 1 failed, 1 were there already\n")


@pytest.mark.usefixtures("ingested")
def test_stats_of_a_server(place: Place, call: Call, server: tuple[str, str]) -> None:
    done = call("stats", *at(server))
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("server    takes calls, 0 streams open\npressure  normal for ")
    assert f"\nmodels    {place.environ['FLETCHER_MODEL']}@" in done.out
    assert "\nstores    default: there, 0 outages, pace 100%\n" in done.out
    assert ": healthy, 0 in flight, 0 restarts, busy " in done.out
    assert "\n          inference, " in done.out
    stats = json.loads(call("stats", "--json", *at(server)).out)
    assert stats["fletcher.rows.received"] >= 300
    assert f"\nrows      {stats['fletcher.rows.received']:,} received, " in done.out


@pytest.mark.usefixtures("ingested")
def test_search_finds_a_row_by_its_text(place: Place, call: Call, server: tuple[str, str]) -> None:
    argv = ("search", TEXTS[7], "--dataset", "rows", "--store", place.store, *at(server))
    done = call(*argv, "--json", "--k", "3", "--columns", "size", "--prompt", "")
    assert (done.code, done.err) == (0, "")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert {name: rows[0][name] for name in ("id", "text", "size")} == {
        "id": "n7",
        "text": TEXTS[7],
        "size": 7,
    }
    assert rows[0]["score"] == pytest.approx(1, abs=1e-2)
    assert rows[0]["score"] > rows[1]["score"] >= rows[2]["score"]
    done = call(*argv, "--json", "--k", "1", "--columns", "timestamp")
    assert (done.code, done.err) == (0, "")
    stamp = dt.datetime.fromisoformat(json.loads(done.out)["timestamp"])
    assert stamp.utcoffset() == dt.timedelta(0)


@pytest.mark.usefixtures("ingested")
def test_search_filters_and_lays_out_lines(
    place: Place, call: Call, server: tuple[str, str]
) -> None:
    argv = ("search", TEXTS[7], "--dataset", "rows", "--store", place.store, *at(server))
    done = call(*argv, "--filter", "size >= 100", "--filter", "id != 'n200'", "--k", "200")
    lines = done.out.splitlines()
    assert len(lines) == 199
    assert all(int(line.split()[2][1:]) >= 100 for line in lines)
    assert lines[0].split(maxsplit=3)[3].startswith("row number ")


@pytest.mark.usefixtures("ingested")
@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--dataset", "row"], 1, "there is no dataset 'row'"),
        (["--dataset", "a/b"], 2, "`dataset` is 'a/b'"),
        (["--dataset", "rows", "--k", "0"], 2, "`k` is 0"),
        (["--dataset", "rows", "--columns", "weight"], 1, "asks for 'weight'; known: id,"),
        (["--dataset", "rows", "--filter", "size"], 2, "`filter` has the end; expected =, "),
        (
            ["--dataset", "rows", "--filter", "siz = 1"],
            1,
            "1; did you mean size?",
        ),
        (["--dataset", "rows", "--filter", "size = big"], 2, "has big; expected a number"),
        (["--dataset", "rows", "--store", "none"], 2, "`store` is none"),
    ],
)
def test_searches_that_cannot_be(
    place: Place, call: Call, argv: list[str], code: int, message: str
) -> None:
    done = call("search", "x", "--store", place.store, *argv)
    if "none" in argv:
        done = call("search", "x", *argv)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_search_makes_no_folder_of_a_misspelt_one(call: Call, tmp_path: Path) -> None:
    for scheme in ("lance", "parquet"):
        done = call("search", "x", "--dataset", "rows", "--store", f"{scheme}:{tmp_path / 'typo'}")
        assert (done.code, done.out) == (1, "")
        assert "typo: there is no such folder" in done.err
    assert not (tmp_path / "typo").exists()


def test_with_a_server_elsewhere_the_default_store_is_not_searched_silently(
    call: Call, server: tuple[str, str]
) -> None:
    done = call("search", "x", "--dataset", "rows", *at(server))
    assert (done.code, done.out) == (2, "")
    assert "`store` is missing" in done.err
    assert done.err.count("\n") == 1


def test_a_query_without_text_is_refused(place: Place, call: Call) -> None:
    done = call("search", "  ", "--dataset", "rows", "--store", place.store)
    assert (done.code, done.out) == (2, "")
    assert "`query` is empty" in done.err


def test_search_refuses_a_dataset_of_another_model(
    place: Place, call: Call, server: tuple[str, str]
) -> None:
    spec = VectorSpec("other@0123456789ab", 32, "float32", 2, "mean", normalized=True)
    folder = place.folder / "parquet"
    store = open_store(f"parquet:{folder}")
    schema = output_schema(spec, id_type=pa.utf8(), batch_key=True)
    store.open_writer("rows", schema, "append").close()
    store.close()
    argv = ("search", "x", "--dataset", "rows", "--store", f"parquet:{folder}", *at(server))
    done = call(*argv, "--model", place.environ["FLETCHER_MODEL"])
    assert (done.code, done.out) == (1, "")
    assert "holds vectors of other@0123456789ab" in done.err


def test_embed_prints_a_line_a_text(place: Place, server: tuple[str, str]) -> None:
    done = place.run("embed", "-", *at(server), stdin="a first\na second\n")
    assert done.code == 0
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["text"] for row in rows] == ["a first", "a second"]
    vectors = np.array([row["vector"] for row in rows], np.float32)
    assert vectors.shape == (2, 32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_embed_prints_chunks_of_a_text_that_goes_on(
    place: Place, call: Call, server: tuple[str, str]
) -> None:
    how = ("--chunking", "tokens:8:none")
    text = "Grüße, 世界!\n\n of them \r\n" * 40
    done = place.run("embed", "-", "--continuous", *how, *at(server), stdin=text)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert "".join(row["text"] for row in rows) == text
    assert [row["chunk_index"] for row in rows] == list(range(len(rows)))
    assert (rows[-1]["chunk_end"], len(rows[0]["vector"])) == (len(text), 32)
    done = call("embed", "-", "--continuous", *at(server))
    assert (done.code, done.out) == (2, "")
    assert "end `chunking` with :none" in done.err
    done = call("embed", "x", "--continuous", *how, *at(server))
    assert (done.code, done.out) == (2, "")
    assert "`continuous` needs - for standard input" in done.err


@pytest.mark.parametrize("how", [("--continuous", "--chunking", "tokens:8:none"), ()])
def test_a_refusal_is_told_while_more_may_come(
    place: Place, server: tuple[str, str], how: tuple[str, ...]
) -> None:
    argv = place.command("embed", "-", "--dims", "33", *how, *at(server))
    with subprocess.Popen(
        argv, env=place.environ, text=True, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()  # to the process's end: nothing was written, nor the end
    assert (process.returncode, said.count("\n")) == (1, 1), said
    assert "`dims` is 33" in said


def test_what_is_sent_is_compressed_as_asked(call: Call, server: tuple[str, str]) -> None:
    address, token = server
    sizes = []
    for codec in ("none", "zstd"):
        with Proxy(int(address.rpartition(":")[2])) as proxy:
            uri = f"grpc://127.0.0.1:{proxy.port}"
            text = "the same words again " * 1000
            done = call("embed", text, "--compression", codec, *at((uri, token)))
            assert done.code == 0, done.err
            sizes.append(proxy.sent)
    assert sizes[1] < sizes[0] // 2


def test_embed_writes_arrays_and_arrow(place: Place, call: Call, server: tuple[str, str]) -> None:
    npy, arrow = place.folder / "x.npy", place.folder / "x.arrow"
    call("embed", "a", "b", "--format", "npy", "--output", str(npy), *at(server))
    call("embed", "a", "b", "--format", "arrow", "--output", str(arrow), *at(server))
    array = np.load(npy)
    assert (array.shape, array.dtype) == ((2, 32), np.float32)
    table = pa.ipc.open_stream(arrow.read_bytes()).read_all()
    assert table.column("text").to_pylist() == ["a", "b"]
    assert np.array_equal(np.array(table.column("vector").to_pylist(), np.float32), array)


def test_embed_gives_int8_with_its_scale_and_bits(call: Call, server: tuple[str, str]) -> None:
    whole, int8, bits = (
        json.loads(call("embed", "a", "--dtype", dtype, *at(server)).out)
        for dtype in ("float32", "int8", "ubinary")
    )
    assert list(int8) == ["text", "vector", "scale"]
    scaled = np.array(int8["vector"]) * int8["scale"]
    assert scaled == pytest.approx(np.array(whole["vector"]), abs=int8["scale"])
    assert (len(bits["vector"]), all(type(one) is int for one in bits["vector"])) == (4, True)


def test_a_text_that_fails_is_named(call: Call, server: tuple[str, str]) -> None:
    argv = ("embed", "short", "word " * 50, "--truncate", "error", *at(server))
    done = call(*argv)
    assert (done.code, done.out) == (1, "")
    assert "fletcher embed: text 2: " in done.err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 1, "it asks for a token; give --token-file"),
        (["--token-file", "WRONG"], 1, "the token is not valid; check --token-file"),
        (["--token-file", "/dev/null"], 2, "holds no token"),
        (["--token-file", "/nowhere"], 2, "No such file"),
        (["--device", "cpu"], 2, "`device` has no meaning with --server"),
    ],
)
def test_servers_that_do_not_let_in(
    call: Call,
    server: tuple[str, str],
    flags: list[str],
    code: int,
    message: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "wrong").write_text("wrong\n")
    flags = [str(tmp_path / "wrong") if word == "WRONG" else word for word in flags]
    done = call("embed", "x", "--server", server[0], *flags)
    assert (done.code, done.out) == (code, "")
    assert message in done.err


@pytest.mark.parametrize(
    "argv",
    [("embed", "x"), ("search", "x", "--dataset", "d"), ("ingest", "nowhere", "--dataset", "d")],
)
def test_an_address_without_its_scheme_is_told_how_it_was_meant(
    call: Call, argv: tuple[str, ...]
) -> None:
    done = call(*argv, "--server", "127.0.0.1:8815")
    assert (done.code, done.out) == (2, "")
    assert "`server` is '127.0.0.1:8815'" in done.err
    assert done.err.endswith("; did you mean grpc://127.0.0.1:8815?\n")


def test_nobody_there(call: Call) -> None:
    done = call("embed", "x", "--server", "grpc://127.0.0.1:1")
    assert (done.code, done.out) == (1, "")
    assert "127.0.0.1:1" in done.err
    assert "Traceback" not in done.err


def test_ingest_and_search_without_a_server(place: Place) -> None:
    store = f"lance:{place.folder / 'own'}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    done = place.run("ingest", "-", "--dataset", "lines", "--store", store, "--json", stdin=lines)
    assert (done.code, done.err) == (
        0,
        "fletcher ingest: standard input is read as JSON lines; to change that, give --format\n",
    )
    summary = json.loads(done.out)
    assert (summary["rows_stored"], summary["store"]) == (300, store)
    done = place.run(
        "search", TEXTS[9], "--dataset", "lines", "--store", store, "--k", "1", "--prompt", ""
    )
    assert (done.code, done.err) == (0, "")
    assert done.out.rstrip().endswith(TEXTS[9])


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["nowhere.parquet", "--dataset", "x"], 2, "nowhere.parquet"),
        (["FILE", "--dataset", "x"], 1, "`body`, `name`, `size`"),
        (["FILE", "--dataset", "a/b", "--text", "body"], 2, "`dataset` is 'a/b'"),
        (["FILE", "--dataset", "x", "--dims", "0", "--text", "body"], 2, "`dims` is 0"),
        (["FILE", "--dataset", "x", "--text", "body", "--store", "ftp:x"], 2, "'ftp:x'"),
        (["FILE", "--dataset", "x", "--text", "body", "--store", "none"], 2, "`store` is none"),
    ],
)
def test_ingestions_that_cannot_be(
    place: Place, call: Call, argv: list[str], code: int, message: str
) -> None:
    argv = [str(place.file) if word == "FILE" else word for word in argv]
    done = call("ingest", *argv)
    assert (done.code, done.out) == (code, ""), done.err
    assert message in done.err
    assert done.err.count("\n") == 1


def test_an_unknown_model_is_one_line(place: Place) -> None:
    done = place.run("embed", "x", "--model", "nonesuch")
    assert (done.code, done.out) == (1, "")
    assert "nonesuch" in done.err
    assert "Traceback" not in done.err


def test_doctor_names_what_is_broken(call: Call) -> None:
    done = call("doctor", "--json")
    report = json.loads(done.out)
    assert (done.code, report["ok"]) == (0, True), done.out
    assert {one["part"] for one in report["findings"]} >= {"hardware", "software", "engine"}
    done = call("doctor", "--store", "grpc://127.0.0.1:1", "--model", "nonesuch")
    assert done.code == 1
    assert "2 to fix" in done.out
    assert "Traceback" not in done.out + done.err


def test_doctor_makes_no_store(call: Call, tmp_path: Path) -> None:
    done = call("doctor", "--store", f"lance:{tmp_path / 'typo'}")
    assert done.code == 0
    assert "typo: does not exist yet" in done.out
    assert not (tmp_path / "typo").exists()
