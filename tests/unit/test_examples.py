"""The examples, run with wrong and right arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

EXAMPLES = Path(__file__).parents[2] / "examples"
SAMPLE = str(EXAMPLES / "data" / "debian-sample.parquet")
NOBODY = "grpc://127.0.0.1:1"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("put.py", [], "usage: "),
        ("put.py", ["a", "b", "c", "d"], "usage: "),
        ("put.py", [SAMPLE, "d", NOBODY], f"nobody answers at {NOBODY}"),
        ("stream.py", ["a", "b"], "usage: "),
        ("stream.py", [NOBODY], f"nobody answers at {NOBODY}"),
        ("search.py", [], "usage: "),
        ("search.py", ["d", "what?", NOBODY, NOBODY], f"nobody answers at {NOBODY}"),
    ],
)
def test_a_wrong_call_ends_with_one_line(name: str, arguments: list[str], said: str) -> None:
    done = run(name, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


class _Answering(flight.FlightServerBase):
    def do_action(
        self, context: flight.ServerCallContext, action: flight.Action
    ) -> list[bytes | pa.Buffer]:
        asked = json.loads(action.body.to_pybytes())
        if action.type == "embed":
            assert asked["texts"] == ["what?"]
            return [json.dumps({"embeddings": [[1.0, 2.0]]}).encode()]
        assert asked == {"dataset": "d", "vector": [1.0, 2.0], "k": 5}
        found = pa.record_batch({"id": ["a", "b"], "score": [0.75, 0.5]})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, found.schema) as writer:
            writer.write_batch(found)
        return [sink.getvalue()]


def test_search_prints_its_results() -> None:
    with _Answering("grpc://127.0.0.1:0") as server:
        uri = f"grpc://127.0.0.1:{server.port}"
        done = run("search.py", "d", "what?", uri, uri)
        assert (done.returncode, done.stdout) == (0, "0.750  a\n0.500  b\n"), done.stderr
        done = run("search.py", "d", "what?", uri, NOBODY)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"nobody answers at {NOBODY}")


class _Failing(flight.FlightServerBase):
    def do_exchange(
        self, context: Any, descriptor: Any, reader: Any, writer: flight.MetadataRecordBatchWriter
    ) -> None:
        assert reader.schema.names == ["id", "text"]  # from here on it waits for its input
        told = json.dumps({"code": "internal", "message": "out of luck"}).encode()
        writer.write_metadata(told)
        with pytest.raises(flight.FlightCancelledError):
            reader.read_chunk()  # as Fletcher does, it gives the client time to leave
        raise flight.FlightServerError("out of luck", told)


def test_a_call_that_fails_ends_the_stream_though_more_text_may_come() -> None:
    with _Failing("grpc://127.0.0.1:0") as server:
        command = [sys.executable, str(EXAMPLES / "stream.py"), f"grpc://127.0.0.1:{server.port}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, **pipes, text=True) as running:
            try:
                assert running.wait(20) == 1  # its input is open all the while
                assert running.stdout is not None
                assert running.stderr is not None
                assert running.stdout.read() == ""
                assert running.stderr.read() == "the call failed: out of luck\n"
            finally:
                running.kill()
