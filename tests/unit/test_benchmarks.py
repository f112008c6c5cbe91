"""Benchmarks run and report all their figures; no test checks a speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.contenders import missing
from benchmarks.engines import ENGINES, title
from benchmarks.flops import Architecture
from benchmarks.plots import draw
from fletcher.models.bundle.bundle import ModelBundle

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLETCHER_HOME with the tiny model."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "models").symlink_to(tiny_bundle.folder.parent)
    return folder


def run(home: Path, *argv: str) -> tuple[str, dict[str, Any]]:
    """Output and JSON of a benchmark on the shipped sample with the tiny model."""
    name, *rest = argv
    out = Path(tempfile.mkdtemp(prefix=name, dir=home))
    sample = ROOT / "examples" / "data" / "debian-sample.parquet"
    command = [sys.executable, "-m", "benchmarks", name, "--home", str(home), "--model", "tiny"]
    command += ["--corpus", str(sample), "--out", str(out), *rest]
    # Benchmarks must ignore this variable: a server would refuse to start with it.
    environ = os.environ | {"FLETCHER_MAX_STREAMS": "none"}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=150
    )
    assert done.returncode == 0, done.stderr
    (written,) = out.glob("*.json")
    return done.stdout, json.loads(written.read_text(encoding="utf-8"))


def test_throughput_compares_all_contenders_in_one_table(home: Path) -> None:
    printed, result = run(home, "throughput", "--quick", "--texts", "100", "--no-peers")
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "sentence-transformers float32",
        "sentence-transformers bfloat16",
        "sentence-transformers on ONNX Runtime",
        "sentence-transformers on OpenVINO",
        "fastembed, Fletcher's graph",
        "Infinity float32",
        "Infinity bfloat16",
        "Infinity on ONNX Runtime",
        "Infinity's server float32, HTTP",
        "Infinity's server bfloat16, HTTP",
        "bare ONNX Runtime float32, ready tokens",
        "bare OpenVINO float32, ready tokens",
        "bare OpenVINO bfloat16, ready tokens",
        "Fletcher, DoExchange of float32 vectors",
        "Fletcher, DoPut to rows in LanceDB",
    ]
    lines = printed.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in rows)
    assert [row.get("skipped") for row in rows.values()][:10] == ["--no-peers"] * 10
    assert result["sample"]["texts"] == 100
    assert result["reference"] == "bare ONNX Runtime float32, ready tokens"
    assert result["ratio_to_own_engine"] > 0
    for row in rows.values():
        if "skipped" not in row:
            assert len(row["seconds"]) == 1
            assert row["texts_per_s"] > 0
            # Rows in another order, or of other texts, would be far below.
            assert 0.98 < row["cosine_lowest"] <= row["cosine_mean"] < 1.000001
    assert rows["Fletcher, DoPut to rows in LanceDB"]["details"]["memory"]["peak"] > 1 << 20


def test_throughput_of_some_rows_only(home: Path) -> None:
    flags = ("--quick", "--texts", "20", "--only", "DoExchange, no-such")
    printed, result = run(home, "throughput", *flags)
    (row,) = result["rows"]
    assert row["name"] == result["reference"] == "Fletcher, DoExchange of float32 vectors"
    assert "to its own engine" not in printed
    command = [sys.executable, "-m", "benchmarks", "throughput", "--home", str(home)]
    command += ["--model", "tiny", "--only", "fastembed", "--no-peers"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "nobody was measured: fastembed, Fletcher's graph: --no-peers" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_peer_reports_missing_libraries() -> None:
    here = Path(sys.executable)
    assert missing(here, ("json", "email.message")) == ""
    # A missing package has no modules.
    assert missing(here, ("json", "no_such", "no_such.part")) == "lacks no_such, no_such.part"
    assert missing(Path("/no/such/python"), ()).startswith("cannot be run: ")


def test_overhead_reports_rows_and_memory_over_time(home: Path) -> None:
    options = ("--rows", "3000", "--batch-rows", "700", "--repeats", "1")
    printed, result = run(home, "overhead", *options)
    uploads = {upload["name"]: upload["moments"] for upload in result["uploads"]}
    assert list(uploads) == ["no model, no tokenizer", "no model"]
    for moments in uploads.values():
        assert moments[0]["rows"] == 0
        assert moments[-1]["rows"] == 3000
    served, bare = result["rows"][:2], result["rows"][2:]
    assert len(bare) == 2
    assert all(row["rows_per_s"] > 0 for row in result["rows"])
    for row in served:
        assert 1 << 20 < row["front_bytes"][0]["start"] <= row["front_bytes"][0]["peak"]
        assert row["cpu_us_per_row"]["front"] > 0
    assert "front process: " in printed


def test_overhead_alone_needs_no_tokenizer(home: Path) -> None:
    options = ("--rows", "700", "--batch-rows", "700", "--repeats", "1", "--without-tokenizer")
    printed, result = run(home, "overhead", *options)
    assert [row["name"] for row in result["rows"]] == ["no model, no tokenizer"]
    assert "library alone" not in printed


def test_delivery_compares_durabilities(home: Path) -> None:
    printed, result = run(home, "delivery", "--rows", "2000", "--repeats", "1")
    assert [row["name"] for row in result["rows"]] == [
        "memory, LanceDB in process",
        "store, LanceDB in process",
        "journal, LanceDB in process",
        "journal, fletcher store over Flight",
    ]
    assert all(row["rows_per_s"] > 0 for row in result["rows"])
    assert "medians of 1 turns" in printed


def test_neighbours_compares_two_crowds(home: Path) -> None:
    flags = ["--clients", "2", "--seconds", "4", "--interval-s", "0.2"]
    _, result = run(home, "neighbours", *flags)
    assert [row["crowd"] for row in result["rows"]] == ["well-formed", "hostile"]
    for row in result["rows"]:
        assert (row["lost"], row["doubled"], row["failed"]) == (0, 0, 0)
        assert row["requests"]["texts"] > 0
        assert 0 < row["embed_p50_ms"] <= row["embed_p99_ms"]
    assert result["rows"][1]["requests"]["refused or given up"] > 0


def test_latency_reports_idle_and_loaded(home: Path) -> None:
    printed, result = run(
        *(home, "latency", "--requests", "20", "--windows", "2", "--window-s", "0.5"),
        # A small limit, because the server stores the bulk load before it ends.
        *("--", "--max-memory", "64MiB", "--max-message-bytes", "16MiB", "--max-streams", "32"),
    )
    assert [row["name"] for row in result["rows"]] == [
        "bare engine, ready tokens",
        "the same, 2 ms pause before each",
        "Fletcher, idle",
        "Fletcher, under bulk load",
    ]
    for row in result["rows"]:
        assert len(row["ms"]) == 20
        assert 0 < row["p50"] <= row["p95"] <= row["p99"]
    assert len(result["bulk_tokens_per_s"]) == 2
    assert "aims: " in printed
    assert "a loss of " in printed


def test_operations_of_a_forward_pass_are_those_of_its_products(tiny_bundle: ModelBundle) -> None:
    pytest.importorskip("onnx")
    assert Architecture.of(tiny_bundle) == Architecture(32, 64, 2, last_first_only=False)
    one = Architecture(hidden=2, intermediate=8, num_layers=1, last_first_only=False)
    tokens, width, inner = 3, 2, 8
    projections = 4 * 2 * tokens * width * width  # queries, keys, values and the output
    feed_forward = 2 * 2 * tokens * width * inner
    attention = 2 * 2 * tokens * tokens * width  # scores, and the mixed values
    assert one.forward(np.array([tokens])) == projections + feed_forward + attention
    assert one.forward(np.array([tokens, tokens])) == 2 * one.forward(np.array([tokens]))
    # With `cls` pooling, the last layer computes only keys and values for every token.
    first = Architecture(hidden=2, intermediate=8, num_layers=1, last_first_only=True)
    assert first.forward(np.array([1])) == one.forward(np.array([1]))
    keys_and_values = 2 * 2 * tokens * width * width
    others = 2 * 2 * width * width + 2 * 2 * width * inner + 2 * 2 * tokens * width
    assert first.forward(np.array([tokens])) == keys_and_values + others


def test_roofline_compares_engines_with_plain_products(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    uneven = tmp_path / "uneven.parquet"
    pq.write_table(pa.table({"title": [""] * 20, "body": ["a", "a b " * 50] * 10}), uneven)
    flags = ("--corpus", str(uneven), "--repeats", "1", "--seconds", "0.01")
    printed, result = run(home, "roofline", *flags)
    names = [row["name"] for row in result["rows"]]
    assert sorted([*names, *result["skipped"]]) == sorted(title(*one) for one in ENGINES)
    assert names
    for row in result["rows"]:
        # Padding is computed, and useless.
        assert 0 < row["useful_flops_per_s"] < row["padded_flops_per_s"]
        assert row["ratio"] == row["useful_flops_per_s"] / row["gemm_flops_per_s"]
        assert list(row["turns"][0]["gemm_by_shape"]) == ["32 x 96", "32 x 32", "32 x 64"]
    assert "plain products" in printed


def test_stages_are_measured_alone_and_add_up(home: Path) -> None:
    printed, result = run(
        home, "stages", "--texts", "60", "--batch-rows", "20", "--repeats", "1", "--cores", "1"
    )
    engine = f"inference, {result['engine']}, ready tokens"
    alone = ["Flight and intake", "tokenization, 1 processes, with transfer", "planning", engine]
    alone.append("assembly and delivery into LanceDB")
    in_sum = [row for row in result["rows"] if row["in_sum"]]
    assert [row["name"] for row in in_sum] == alone
    assert result["rows"][-1]["name"] == "end to end, DoPut to rows in LanceDB"
    assert all(row["rows_per_s"] > 0 for row in result["rows"])
    cost = sum(row["cpu_ms_per_row"] for row in in_sum)
    assert result["sum"]["cpu_ms_per_row"] == cost > 0
    assert "tokenization, 1 processes, without transfer" in printed


def test_scaling_has_a_point_for_every_value(home: Path) -> None:
    flags = ("--texts", "40", "--repeats", "1", "--backend", "null", "--batch-rows", "20")
    values = ("--tokenizer-workers", "1", "--replicas", "2,1", "--budgets", "256")
    printed, result = run(home, "scaling", *flags, *values)
    curves = {curve["name"]: curve["points"] for curve in result["curves"]}
    asked = {name: [point["value"] for point in points] for name, points in curves.items()}
    assert asked == {
        "tokenizer processes, end to end": [1],
        "replicas sharing the cores, ready tokens": [1, 2],
        "max_batch_tokens, end to end": [256],
    }
    assert all(point["rows_per_s"] > 0 for points in curves.values() for point in points)
    assert "replicas sharing the cores" in printed


HARDWARE = {"cpu": "some processor", "cores": 2}
TIMES = {"texts_per_s": 10.0, "rows_per_s": 10.0, "seconds": [1.0, 1.5]}
RESULTS: list[dict[str, Any]] = [
    {
        "benchmark": "throughput",
        "sample": {"texts": 12},
        "rows": [{"name": "one", **TIMES}, {"name": "other", "skipped": "not here"}],
    },
    {"benchmark": "latency", "rows": [{"name": "idle", "ms": [3.0, 1.0, 2.0]}]},
    {
        "benchmark": "overhead",
        "uploads": [
            {
                "name": name,
                "moments": [
                    {"seconds": float(second), "front_bytes": 1 << 20, "worker_bytes": 2 << 20}
                    for second in range(3)
                ],
            }
            for name in ("one", "other")
        ],
    },
    {
        "benchmark": "scaling",
        "curves": [
            {"name": name, "points": [{"value": value, **TIMES} for value in (1, 2)]}
            for name in ("tokenizers, end to end", "replicas")
        ],
    },
]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["benchmark"])
def test_results_are_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    assert draw({"model": "tiny@0", "hardware": HARDWARE, **result}, path) == f"drawn to {path}"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "plot.png"
    assert draw(RESULTS[0], path).startswith("not drawn: matplotlib is not installed")
    assert not path.exists()


def test_arguments_out_of_range_and_servers_that_fail_are_errors_in_one_line(home: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "overhead", "--home", str(home)]
    command += ["--model", "tiny", "--rows", "10", "--", "--group-rows", "0"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "group_rows" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_gpu_check_runs_on_the_twin(home: Path) -> None:
    printed, result = run(
        *(home, "gpu", "--device", "cpu", "--repeats", "1", "--texts", "24"),
        *("--random-model", "32,1,4,64"),
    )
    real, random = result["models"]
    assert real["model"].startswith("tiny@")
    assert random["model"].startswith("random-bert@")
    for model, num_texts in ((real, 24), (random, 3)):
        parity = model["parity"]
        assert parity["holds"]
        assert 0.99999 <= parity["lowest"] <= parity["mean"] < 1.00001
        assert parity["engine"]["graph"] == "without padding"
        assert parity["texts"] == 60
        engine, plain, captured, server, peer = model["rows"]
        assert 0 < plain["p50"] <= plain["p99"]
        assert plain["note"] == "a launch for each kernel"
        assert len(captured["ms"]) == 200
        assert captured["note"].startswith("single texts of up to ")
        assert engine["texts_per_s"] == pytest.approx(num_texts / engine["seconds"][0])
        assert engine["tokens_per_s"] > 0
        assert server["note"] == "DoPut to rows in LanceDB"
        assert server["tokens_per_s"] > 0
        assert "absent" in peer
    assert "parity holds on 60 golden texts" in printed
    assert "absent: its checkpoint is not here" in printed


def test_exits_have_a_row_each_and_one_for_the_model_without(home: Path) -> None:
    printed, result = run(
        *(home, "exits", "--exits", "1", "--repeats", "1", "--seconds", "0.01", "--cores", "1"),
        *("--random-model", "32,2,4,64"),
    )
    assert {row["name"].partition(", ")[2] for row in result["rows"]} == {"no exits", "1", "2"}
    for row in result["rows"]:
        assert row["tokens_per_s"] > 0
        assert row["rss_bytes"] > row["weights_bytes"] > 0
        if row["name"].endswith(", 2"):
            assert row["ratio"] == 1
    assert "x all layers" in printed


def test_the_gpu_check_without_cuda_says_so_in_one_line() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check"), "--quick"]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu_check: no CUDA provider: ")
