"""The benchmarks run and report everything they are for; how fast is no test's business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fletcher.models.bundle import ModelBundle

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("onnxruntime")
pytest.importorskip("lancedb")


@pytest.fixture(scope="module")
def home(tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLETCHER_HOME with the tiny model."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "models").symlink_to(tiny_bundle.folder.parent)
    return folder


def run(home: Path, *argv: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark printed and what it wrote; on the shipped sample with the tiny model."""
    name, *rest = argv
    out = home / "results" / name
    sample = ROOT / "examples" / "data" / "debian-sample.parquet"
    command = [sys.executable, "-m", "benchmarks", name, "--home", str(home), "--model", "tiny"]
    command += ["--corpus", str(sample), "--out", str(out), *rest]
    # One that benchmarks must not listen to: a server would refuse to start with it.
    environ = os.environ | {"FLETCHER_MAX_STREAMS": "none"}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=150
    )
    assert done.returncode == 0, done.stderr
    (written,) = out.iterdir()
    return done.stdout, json.loads(written.read_text(encoding="utf-8"))


def test_throughput_compares_everybody_in_one_table(home: Path) -> None:
    printed, result = run(home, "throughput", "--quick", "--texts", "100", "--no-peers")
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "sentence-transformers float32",
        "sentence-transformers bfloat16",
        "bare ONNX Runtime float32, ready tokens",
        "bare OpenVINO float32, ready tokens",
        "bare OpenVINO bfloat16, ready tokens",
        "Fletcher, DoPut to rows in LanceDB",
    ]
    lines = printed.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in rows)
    assert [row.get("skipped") for row in rows.values()][:2] == ["--no-peers"] * 2
    assert result["sample"]["texts"] == 100
    assert result["reference"] == "bare ONNX Runtime float32, ready tokens"
    assert result["ratio_to_own_engine"] > 0
    for row in rows.values():
        if "skipped" not in row:
            assert len(row["seconds"]) == 1
            assert row["texts_per_s"] > 0
            # Rows in another order, or of another text, would be far below.
            assert 0.98 < row["cosine_lowest"] <= row["cosine_mean"] < 1.000001
    assert rows["Fletcher, DoPut to rows in LanceDB"]["details"]["memory"]["peak"] > 1 << 20


def test_overhead_reports_rows_and_memory_over_time(home: Path) -> None:
    printed, result = run(home, "overhead", "--rows", "3000", "--batch-rows", "700")
    assert result["rows_per_s"] > 0
    assert result["moments"][0]["rows"] == 0
    assert result["moments"][-1]["rows"] == 3000
    front = result["front_bytes"]
    assert 1 << 20 < front["start"] <= front["peak"]
    assert "front process: " in printed


def test_delivery_compares_what_promises_cost(home: Path) -> None:
    printed, result = run(home, "delivery", "--rows", "2000", "--repeats", "1")
    assert [row["name"] for row in result["rows"]] == [
        "memory, LanceDB in process",
        "store, LanceDB in process",
        "journal, LanceDB in process",
        "journal, fletcher store over Flight",
    ]
    assert all(row["rows_per_s"] > 0 for row in result["rows"])
    assert "medians of 1 turns" in printed


def test_latency_reports_idle_and_loaded(home: Path) -> None:
    printed, result = run(home, "latency", "--requests", "20")
    assert [row["name"] for row in result["rows"]] == [
        "bare engine, ready tokens",
        "Fletcher, idle",
        "Fletcher, under bulk load",
    ]
    for row in result["rows"]:
        assert len(row["ms"]) == 20
        assert 0 < row["p50"] <= row["p95"] <= row["p99"]
    assert "aims: " in printed


def test_arguments_out_of_range_and_servers_that_fail_are_errors_in_one_line(home: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "overhead", "--home", str(home)]
    command += ["--model", "tiny", "--rows", "10", "--", "--group-rows", "0"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "group_rows" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_gpu_check_runs_its_whole_way_on_the_twin(home: Path) -> None:
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
        engine, server, peer = model["rows"]
        assert engine["texts_per_s"] == pytest.approx(num_texts / engine["seconds"][0])
        assert engine["tokens_per_s"] > 0
        assert server["note"] == "DoPut to rows in LanceDB"
        assert server["tokens_per_s"] > 0
        assert "absent" in peer
    assert "parity holds on 60 golden texts" in printed
    assert "absent: its checkpoint is not here" in printed


def test_the_gpu_check_without_cuda_says_so_in_one_line() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check"), "--quick"]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu_check: no CUDA provider: ")
