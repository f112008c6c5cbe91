"""The command `fletcher-serve` as people start, stop and kill it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import flight

from tests.doubles.longbow import LongbowDouble
from tests.integration.flight_calls import TIMEOUT, action, command, error_of, put
from tests.integration.numbered import SCHEMA, assert_every_row_once, batches, rows, stored
from tests.integration.processes import (
    Place,
    ServerProcess,
    clean_environ,
    eventually,
    is_alive,
    serving,
)

START_TIMEOUT_S = 60


@pytest.fixture
def place(tiny_home: Path, tmp_path: Path) -> Place:
    return Place(tiny_home, tmp_path / "vectors")


@contextlib.contextmanager
def open_upload(
    server: ServerProcess, num_rows: int, **fields: object
) -> Iterator[flight.FlightClient]:
    """An upload whose rows are with the server and whose client then says nothing more."""
    with flight.connect(server.address) as client:
        writer, _ = client.do_put(command(dataset="d", **fields), SCHEMA, TIMEOUT)
        for batch in batches(0, num_rows, 100):
            writer.write_batch(batch)
        eventually(
            lambda: action(client, "stats")["fletcher.rows.received"] >= num_rows, "rows received"
        )
        try:
            yield client
        finally:
            with contextlib.suppress(flight.FlightError, pa.ArrowException):
                writer.close()


def test_it_says_one_line_on_standard_output(place: Place) -> None:
    with serving(place.argv()) as server:
        assert server.address.startswith("grpc://127.0.0.1:")
        with flight.connect(server.address) as client:
            assert action(client, "ready")["ready"] is True
        assert server.end() == 0
    assert server.lines == [f"listening on {server.address}\n"]
    assert not [line for line in server.errors if "Traceback" in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stores_what_was_accepted(place: Place, number: signal.Signals) -> None:
    with serving(place.argv("--group-delay-ms", "60s", "--drain-timeout", "10s")) as server:
        children = server.children()
        assert len(children) >= 2  # a tokenizer and a replica
        with open_upload(server, 1000, upload_id="u") as client:
            server.process.send_signal(number)
            with pytest.raises(flight.FlightUnavailableError):
                while True:  # until the signal has arrived
                    put(client, [rows(0, 1)], SCHEMA, dataset="other")
            assert server.process.wait(30) == 0
        eventually(lambda: not any(map(is_alive, children)), "no child is left")
    assert_every_row_once(stored(place.vectors, "d"), 1000)


def test_a_drain_that_cannot_end_does_not_take_longer_than_it_may(place: Place) -> None:
    with (
        stalled_store() as store,
        serving(place.argv("--store", store, "--drain-timeout", "1s")) as server,
        open_upload(server, 100),
    ):
        assert server.end(timeout_s=30) == 1
        assert not [line for line in server.errors if "Traceback" in line]


def test_the_second_signal_ends_it_at_once(place: Place) -> None:
    with (
        stalled_store() as store,
        serving(place.argv("--store", store, "--drain-timeout", "600s")) as server,
    ):
        children = server.children()
        with open_upload(server, 100):
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: "draining" in "".join(server.errors), "the drain has begun")
            assert server.end(signal.SIGTERM, timeout_s=30) == 128 + signal.SIGTERM
        eventually(lambda: not any(map(is_alive, children)), "no child is left")


# Threads of gRPC that could not start: the end of a server then waits for ever, and holds the
# interpreter's lock.
ENDLESS = """
import ctypes, sys
from fletcher.cli import main
from fletcher.MODULE import CLASS
CLASS.__del__ = lambda self: ctypes.PyDLL(None).sleep(600)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("name", "module", "server_class"),
    [("serve", "flight.server", "FlightServer"), ("store", "storeserver.server", "_DataServer")],
)
def test_a_server_that_cannot_be_destroyed_does_not_hold_up_the_end(
    place: Place, name: str, module: str, server_class: str
) -> None:
    code = ENDLESS.replace("MODULE", module).replace("CLASS", server_class)
    options = ["--path", str(place.vectors), "--port", "0", "--meta-port", "0"]
    if name == "serve":
        options = place.argv()[3:]
    with serving([sys.executable, "-c", code, name, *options]) as server:
        assert server.end() == 0


@pytest.mark.parametrize("journal", ["0", "64MiB"])
def test_kill_9_leaves_no_process_and_no_lock_and_loses_no_row(place: Place, journal: str) -> None:
    total = 6000
    options = ("--group-rows", "500", "--max-journal", journal)
    with serving(place.argv(*options)) as server:
        children = server.children()
        with flight.connect(server.address) as client:
            writer, reader = client.do_put(command(dataset="d", upload_id="u"), SCHEMA, TIMEOUT)
            sent = threading.Event()

            def write() -> None:
                with contextlib.suppress(flight.FlightError, pa.ArrowException):
                    for batch in batches(0, total, 50):
                        writer.write_batch(batch)
                        sent.set()

            thread = threading.Thread(target=write)
            thread.start()
            acknowledged = json.loads(reader.read().to_pybytes())["rows_durable"]
            server.process.kill()
            server.process.wait(30)
            thread.join(30)
            with contextlib.suppress(flight.FlightError, pa.ArrowException):
                writer.close()
        eventually(lambda: not any(map(is_alive, children)), "no child is left", 10)
    assert acknowledged > 0

    with serving(place.argv(*options)) as server, flight.connect(server.address) as client:
        status = action(client, "upload_status", {"upload_id": "u", "dataset": "d"})
        assert acknowledged <= status["rows_durable"] <= total
        first = status["rows_durable"]
        resent = [
            (batch, json.dumps({"row_offset": first + 50 * n}).encode())
            for n, batch in enumerate(batches(first, total, 50))
        ]
        writer, reader = client.do_put(command(dataset="d", upload_id="u"), SCHEMA, TIMEOUT)
        for batch, metadata in resent:
            writer.write_with_metadata(batch, metadata)
        writer.write_metadata(json.dumps({"end": True, "rows": total}).encode())
        writer.done_writing()
        *_, summary = read_all(reader)
        writer.close()
        assert summary["complete"] is True
        assert summary["rows_durable"] == total
        assert server.end() == 0
    assert_every_row_once(stored(place.vectors, "d"), total)


def test_a_store_that_is_not_there_is_told_to_the_upload_not_to_the_others(place: Place) -> None:
    with dead_store() as store, serving(place.argv("--store", store)) as server:
        with flight.connect(server.address) as client:
            with pytest.raises(flight.FlightUnavailableError) as caught:
                put(client, [rows(0, 10)], SCHEMA, dataset="d")
            error = error_of(caught.value)
            assert error["code"] == "store_unavailable"
            assert action(client, "embed", {"texts": ["a word"]})["embeddings"]
        assert server.end() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--host", "0.0.0.0"], ["host", "--token-file", "--insecure"], id="public"),
        pytest.param(["--backend", "torch"], ["backend", "'torch'", "onnxruntime"], id="backend"),
        pytest.param(
            ["--backend", "onnxruntime", "--device", "cuda"], ["device", "cuda"], id="no GPU"
        ),
        pytest.param(["--model", "nobody"], ["model", "nobody"], id="unknown model"),
        pytest.param(["--store", "lance"], ["store", "'lance'", "lance:PATH"], id="store address"),
        pytest.param(["--store", "s3:bucket"], ["store", "'s3:bucket'"], id="store scheme"),
        pytest.param(["--token-file", "/nowhere"], ["token_file", "/nowhere"], id="token file"),
        pytest.param(["--max-streems", "3"], ["--max-streems", "--max-streams"], id="misspelt"),
        pytest.param(["--port", "99999"], ["port", "99999", "65535"], id="port"),
    ],
)
def test_what_cannot_be_started_says_so(place: Place, options: list[str], words: list[str]) -> None:
    complaint = refused(place, *options)
    for word in words:
        assert word in complaint


def test_a_port_in_use(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refused(place, "--port", port)


@pytest.mark.parametrize("name", ["model.weights", "tokenizer.json"])
def test_a_file_with_a_wrong_checksum(place: Place, tmp_path: Path, name: str) -> None:
    def flip(raw: bytearray) -> None:
        raw[len(raw) // 2] ^= 1

    complaint = refused(damaged(place, tmp_path, name, flip))
    assert name in complaint
    assert "SHA-256" in complaint


@pytest.mark.parametrize(
    ("backend", "known"), [("null", False), ("onnxruntime", True), ("openvino", True)]
)
def test_a_truncated_onnx_file(place: Place, tmp_path: Path, backend: str, known: bool) -> None:
    def cut(raw: bytearray) -> None:
        del raw[len(raw) // 2 :]

    broken = damaged(place, tmp_path, "model.onnx", cut, known=known)
    complaint = refused(broken, "--backend", backend)
    assert "model.onnx" in complaint
    assert "add" in complaint  # the remedy


def refused(place: Place, *options: str) -> str:
    """What a server that does not start says: one line, no traceback, soon."""
    done = subprocess.run(
        place.argv("--log-level", "error", *options),
        capture_output=True,
        text=True,
        env=clean_environ(),
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    (complaint,) = done.stderr.splitlines()
    return complaint


def damaged(
    place: Place,
    tmp_path: Path,
    name: str,
    damage: Callable[[bytearray], None],
    *,
    known: bool = False,
) -> Place:
    """A copy of the place whose model has a damaged file; `known`: its checksums agree."""
    home = tmp_path / "damaged"
    shutil.copytree(place.home, home)
    folder = home / "models" / place.model
    raw = bytearray((folder / name).read_bytes())
    damage(raw)
    (folder / name).write_bytes(raw)
    if known:
        manifest = json.loads((folder / "fletcher.json").read_text(encoding="utf-8"))
        entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        manifest["files"][name] = entry
        (folder / "fletcher.json").write_text(json.dumps(manifest), encoding="utf-8")
    return dataclasses.replace(place, home=home)


@contextlib.contextmanager
def dead_store() -> Iterator[str]:
    """The address of a store where nobody listens; the port stays reserved."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"grpc://127.0.0.1:{reserved.getsockname()[1]}?profile=fletcher"


class Stalled(LongbowDouble):
    """Never acknowledges a row."""

    def store(self, dataset: str, batch: pa.RecordBatch) -> None:
        threading.Event().wait(30)


@contextlib.contextmanager
def stalled_store() -> Iterator[str]:
    """The address of a store that takes calls and rows and then never answers."""
    with Stalled() as double:
        yield f"{double.address}&profile=longbow"


def read_all(reader: flight.FlightMetadataReader) -> list[dict[str, object]]:
    answers = []
    while (answer := reader.read()) is not None:
        answers.append(json.loads(answer.to_pybytes()))
    return answers
