"""All peers of the benchmarks get the same task; stand-ins replace their libraries."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.contenders import PEERS
from benchmarks.corpus import ROOT
from benchmarks.infinity import REQUEST_TEXTS
from benchmarks.jobs import JobError, run_job
from benchmarks.peer import LOADERS

# The vector of a text that is a number: the number, and 1.
ENGINE = """
import json, os
from pathlib import Path
import numpy as np

def record(**what):
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class EngineArgs:
    def __init__(self, **options):
        self.options = options

class AsyncEmbeddingEngine:
    @classmethod
    def from_args(cls, args):
        engine = cls()
        engine.options = args.options
        return engine

    async def astart(self):
        files = {path.name: path.read_text() for path in Path().iterdir()}
        record(started=self.options, files=files)

    async def astop(self):
        record(stopped=self.options["batch_size"])

    async def embed(self, sentences):
        return [np.array([float(text), 1.0]) for text in sentences], 0
"""
# Answers several large requests only after all have arrived.
SERVER = """
import base64, http.server, json, os, sys, threading
from pathlib import Path
import numpy as np
from infinity_emb import record

together = threading.Barrier(3, timeout=10)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if len(asked["input"]) != 32:
            together.wait()
        assert asked["encoding_format"] == "base64" and self.path == "/embeddings"
        vectors = [np.array([float(text), 1.0], np.float32) for text in asked["input"]]
        data = [{"embedding": base64.b64encode(one.tobytes()).decode()} for one in vectors]
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

def cli():
    flags = sys.argv[2:]
    given = dict(zip(flags[::2], flags[1::2]))
    if given["--dtype"] == "float99":
        print("ValueError: no float99", file=sys.stderr)
        sys.exit(1)
    server = http.server.ThreadingHTTPServer((given["--host"], int(given["--port"])), Handler)
    limit = json.loads((Path(given["--model-id"]) / "sentence_bert_config.json").read_text())
    record(served=given, limit=limit, pid=os.getpid())
    print(f"INFO: Uvicorn running on http://127.0.0.1:{server.server_port}", file=sys.stderr)
    server.serve_forever()
"""
TORCH = "def set_num_threads(number): pass\n"
OPTIMUM = """
from pathlib import Path

class ORTModelForFeatureExtraction:
    @classmethod
    def from_pretrained(cls, checkpoint, export):
        assert export
        return cls()

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "model.onnx").write_text("graph")
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Job of all kinds of peers; they record their requests in `record`."""
    files = {
        "packages/infinity_emb/__init__.py": ENGINE,
        "packages/infinity_emb/cli.py": SERVER,
        "packages/torch.py": TORCH,
        "packages/optimum/onnxruntime.py": OPTIMUM,
        "checkpoint/config.json": '{"hidden_size": 2, "max_position_embeddings": 512}',
        "checkpoint/sentence_bert_config.json": '{"max_seq_length": 512}',
        "texts.json": json.dumps([str(number) for number in range(2 * REQUEST_TEXTS + 40)]),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    return {
        "checkpoint": str(tmp_path / "checkpoint"),
        "precision": "bfloat16",
        "pooling": "mean",
        "max_length": 7,
        "threads": 1,
        "texts": str(tmp_path / "texts.json"),
        "batch_size": 4,
        "batch_sizes": [2, 4],
        "embeddings": str(tmp_path / "embeddings.npy"),
    }


def measured(job: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer and the record; embeddings must be in the order of the texts."""
    answer = run_job([sys.executable, str(ROOT / "benchmarks" / "peer.py")], job, tmp_path)
    embeddings = np.load(job["embeddings"])
    texts = json.loads(Path(job["texts"]).read_text(encoding="utf-8"))
    assert embeddings.tolist() == [[float(text), 1.0] for text in texts]
    lines = (tmp_path / "record").read_text(encoding="utf-8").splitlines()
    return answer, [json.loads(line) for line in lines]


def test_every_peer_has_a_loader() -> None:
    assert {one.kind for one in PEERS} <= set(LOADERS)


def test_infinity_has_an_engine_for_each_batch_size_until_the_end(
    job: dict[str, Any], tmp_path: Path
) -> None:
    answer, records = measured({**job, "kind": "infinity", "batch_size": None}, tmp_path)
    assert answer["batch_size"] in job["batch_sizes"]
    assert set(answer["tuning"]) == {"2", "4"}
    started, stopped = records[:2], records[2:]
    assert [one["started"]["batch_size"] for one in started] == [2, 4]
    assert [one["stopped"] for one in stopped] == [4, 2]
    for one in started:
        options = one["started"]
        assert (options["engine"], options["dtype"]) == ("torch", "bfloat16")
        limits = {name: json.loads(content) for name, content in one["files"].items()}
        assert limits["sentence_bert_config.json"] == {"max_seq_length": 7}
        # A model with a cut table of positions could not be loaded.
        assert limits["config.json"]["max_position_embeddings"] == 512
    kept = tmp_path / "checkpoint" / "sentence_bert_config.json"
    assert kept.read_text(encoding="utf-8") == '{"max_seq_length": 512}'


def test_infinity_on_onnx_runtime_finds_its_graph_and_the_limit(
    job: dict[str, Any], tmp_path: Path
) -> None:
    _, (started, stopped) = measured({**job, "kind": "infinity-onnx"}, tmp_path)
    assert started["started"]["engine"] == "optimum"
    assert started["started"]["pooling_method"] == "mean"
    assert started["files"]["model.onnx"] == "graph"
    config = json.loads(started["files"]["config.json"])
    assert config == {"hidden_size": 2, "max_position_embeddings": 7}
    assert stopped == {"stopped": 4}


def test_infinitys_server_has_several_requests_at_a_time_and_ends(
    job: dict[str, Any], tmp_path: Path
) -> None:
    _, (served,) = measured({**job, "kind": "infinity-server"}, tmp_path)
    assert served["served"]["--batch-size"] == "4"
    assert served["served"]["--dtype"] == "bfloat16"
    assert served["limit"] == {"max_seq_length": 7}
    with pytest.raises(ProcessLookupError):
        os.kill(served["pid"], 0)


def test_a_server_that_does_not_start_says_why_in_its_last_line(
    job: dict[str, Any], tmp_path: Path
) -> None:
    job |= {"kind": "infinity-server", "precision": "float99"}
    with pytest.raises(JobError, match="ValueError: no float99") as raised:
        measured(job, tmp_path)
    assert str(raised.value).endswith("RuntimeError: ValueError: no float99")
