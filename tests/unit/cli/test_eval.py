"""`fletcher eval` with a real server in its process, and with one elsewhere."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fletcher.cli import main
from fletcher.client import Client
from fletcher.config.server import ServeConfig
from fletcher.models.bundle.registry import Registry
from fletcher.runtime import Runtime


@pytest.fixture
def argv(tmp_path, tiny_bundle, monkeypatch):
    for name in [name for name in os.environ if name.startswith("FLETCHER_")]:
        monkeypatch.delenv(name)
    (tmp_path / "models").symlink_to(tiny_bundle.folder.parent)
    words = [f"word{number} and {number * 7}" for number in range(60)]
    table = pa.table({"title": words, "body": [f"about {word}" for word in words]})
    pq.write_table(table, tmp_path / "corpus.parquet")
    columns = ["--query", "title", "--document", "body", "--queries", "20"]
    return ["eval", str(tmp_path / "corpus.parquet"), *columns]


@pytest.fixture
def local(tmp_path, tiny_bundle):
    return ["--home", str(tmp_path), "--model", tiny_bundle.name, "--device", "cpu"]


def test_engines_and_types_side_by_side(argv, local, tmp_path, capsys):
    argv += [*local, "--backend", "onnxruntime", "--threads", "1", "--documents", "50", "--json"]
    argv += ["--output", str(tmp_path / "report.json")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    report = json.loads(out)
    assert (tmp_path / "report.json").read_text() == out
    assert report["corpus"] | {"documents_truncated": 0} == {
        "rows": 60,
        "rows_empty": 0,
        "rows_repeated": 0,
        "documents": 50,
        "queries": 20,
        "documents_truncated": 0,
    }
    first, half, int8, bits = report["rows"]
    assert (first["backend"], first["precision"], first["dtype"]) == (
        "onnxruntime",
        "float32",
        "float32",
    )
    assert (first["dims"], first["layers"], first["bytes_per_vector"]) == (32, 2, 128)
    assert first["ndcg_loss"] == 0
    assert first["texts_per_s"] > 0
    assert (half["dtype"], half["bytes_per_vector"]) == ("float16", 64)
    assert half["cosine"]["min"] > 0.9999
    assert (int8["dtype"], int8["bytes_per_vector"]) == ("int8", 36)
    assert int8["cosine"]["min"] > 0.999
    assert (bits["dtype"], bits["bytes_per_vector"]) == ("ubinary", 4)
    # Of the same run of the model: the second came from the cache.
    assert half["texts_per_s"] == first["texts_per_s"]


def test_exits_by_engines_widths_and_types(argv, tmp_path, tiny_bundle, capsys):
    home = tmp_path / "home"
    checkpoint = Path(__file__).parents[2] / "golden" / "tiny"
    Registry(home / "models").add_model(str(checkpoint), name="deep", exits=(1,), progress=print)
    argv += ["--home", str(home), "--model", "deep", "--device", "cpu", "--threads", "1"]
    lists = [
        "backend=onnxruntime,openvino precision=float32 layers=1 dims=16,32 dtype=float32,int8"
    ]
    argv += ["--variants", *lists, "--allow-undeclared"]
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    reference, *rows = report["rows"]
    assert (reference["layers"], reference["dims"]) == (2, 32)
    assert [(row["backend"], row["layers"], row["dims"], row["dtype"]) for row in rows] == [
        (backend, 1, dims, dtype)
        for backend in ("onnxruntime", "openvino")
        for dims in (16, 32)
        for dtype in ("float32", "int8")
    ]
    # Two layers less one are other vectors, and both engines agree on them.
    assert all(row["cosine"]["mean"] < 0.999 for row in rows)
    ours, theirs = ([row["cosine"]["mean"] for row in half] for half in (rows[:4], rows[4:]))
    assert np.allclose(ours, theirs, atol=1e-4)
    # An exit has a rate of its own, and its widths and types share it.
    assert len({row["texts_per_s"] for row in rows[:4]}) == 1
    for words, expected in (
        ("layers=3", "`layers` is 3, and deep has exits after layers 1, 2"),
        ("layers=1 dims=64", "`dims` is 64, expected at most 32"),
    ):
        assert main([*argv, "--variants", words]) in (1, 2)
        assert expected in capsys.readouterr().err


def test_a_server_elsewhere(argv, tmp_path, tiny_bundle, capsys):
    config = ServeConfig.from_options(
        port=0, home=tmp_path, model=tiny_bundle.name, backend="null", store=("none",)
    )
    with Runtime(config) as server:
        assert main([*argv, "--server", server.address]) == 0
        table = capsys.readouterr().out.splitlines()
        assert [line.split()[:5] for line in table[1:5]] == [
            ["null", "float32", "2", "32", dtype]
            for dtype in ("float32", "float16", "int8", "ubinary")
        ]
        refused = [*argv, "--server", server.address, "--variants", "backend=openvino"]
        assert main(refused) == 2
        error = capsys.readouterr().err
        assert "`variants` asks for openvino float32, but" in error
        assert "runs null float32" in error


def test_the_engine_is_that_of_the_model_asked_for(
    argv, tmp_path, tiny_bundle, monkeypatch, capsys
):
    other = {"model": "other@1", "backend": "openvino", "precision": "bfloat16", "device": "cpu"}
    stats = Client.stats
    config = ServeConfig.from_options(
        port=0, home=tmp_path, model=tiny_bundle.name, backend="null", store=("none",)
    )
    with Runtime(config) as server:
        argv += ["--server", server.address, "--model", tiny_bundle.name, "--variants", "dims=32"]
        monkeypatch.setattr(
            Client, "stats", lambda self: {"replicas": [other, *stats(self)["replicas"]]}
        )
        assert main(argv) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["null", "float32"]
        monkeypatch.setattr(Client, "stats", lambda self: {"replicas": [other]})
        assert main(argv) == 2
        expected = f"`model` {tiny_bundle.qualified_name} is not loaded"
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--variants", "dims=3"], "`dims` is 3, expected one that tiny declares: 32"),
        (["--variants", "precision=float16"], "`precision` float16 is for CUDA"),
        (["--variants", "layer=3"], "did you mean layers"),
        (["--queries", "1"], "`queries` is 1, expected 2 or more"),
        (["--plot", "/nowhere/plot.png"], "`plot` is '/nowhere/plot.png', which cannot be written"),
        (["--query", "heading"], "has no column `heading`"),
        (["--server", "grpc://127.0.0.1:1", "--allow-undeclared"], "`allow_undeclared` has no mea"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(argv, local, capsys, words, expected):
    backend = [] if "precision=float16" in words else ["--backend", "null"]
    assert main([*argv, *local, *backend, *words]) in (1, 2)
    assert expected in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_kindly(argv, local, monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert main([*argv, *local, "--plot", str(tmp_path / "plot.png")]) == 2
    error = capsys.readouterr().err
    assert "`plot` needs matplotlib" in error
    assert "pip install 'longbow-fletcher[plot]'" in error
