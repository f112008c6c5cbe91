"""Every family's graph computes what its reference does, on both engines.

Checkpoints and references are tests/golden/families, made by scripts/make_golden_families.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fletcher.core.batches import MicroBatch, TextBatch
from fletcher.inference.backend import Backend, BackendConfig
from fletcher.inference.onnxruntime import load_twin
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from fletcher.models.onnx.packed import FAMILIES as PACKED_FAMILIES
from fletcher.tokenization.tokenizer import Tokenizer

from .onnx_session import Array, cosines

FAMILIES = Path(__file__).parent / "families"
NAMES = sorted(path.stem for path in FAMILIES.glob("*.parquet"))
ENGINES = ["onnxruntime", "openvino"]
MIN_COSINE, MAX_ERROR = 0.99999, 1e-4


def add(name: str, folder: Path, *, pooling: str = "") -> ModelBundle:
    """Adds a checkpoint; with `pooling` just that, no dense layer and no normalisation after it."""
    checkpoint = folder / name
    shutil.copytree(FAMILIES / name, checkpoint)
    if pooling:
        (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
        modules = checkpoint / "modules.json"
        modules.write_text(json.dumps(json.loads(modules.read_text())[:2]))
    return Registry(folder / "models").add_model(str(checkpoint), progress=print)


def load(bundle: ModelBundle, engine: str) -> Backend:
    module = importlib.import_module(f"fletcher.inference.{engine}")
    config = BackendConfig(
        backend=engine, bundle=str(bundle.folder), threads=1, max_batch_tokens=16, device="cpu"
    )
    loaded: Backend = module.load(config)
    return loaded


def run(backend: Backend, rows: Sequence[Sequence[int]]) -> Array:
    ids = np.concatenate([np.array(row, np.int32) for row in rows])
    batch = MicroBatch(ids, np.array([len(row) for row in rows], np.int32))
    return backend.run(batch).embeddings


def vectors(table: pa.Table, column: str) -> Array:
    return np.array(table[column].to_pylist(), np.float32)


def assert_equal(actual: Array, expected: Array) -> None:
    assert cosines(actual, expected).min() >= MIN_COSINE
    assert np.abs(actual - expected).max() <= MAX_ERROR


def test_every_family_has_a_reference() -> None:
    assert NAMES == [
        "distilbert",
        "jina_bert",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "qwen3",
        "roberta",
        "xlm_roberta",
    ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_vectors_equal_the_reference_in_any_batch(name: str, engine: str, tmp_path: Path) -> None:
    bundle = add(name, tmp_path)
    table = pq.read_table(FAMILIES / f"{name}.parquet")
    rows, expected = table["input_ids"].to_pylist(), vectors(table, "sentence")
    assert {1, 2, 17, 128, 130} <= {len(row) for row in rows}
    assert bundle.max_length == 130
    backend = load(bundle, engine)
    together = run(backend, rows)
    assert_equal(together, expected)
    order = np.random.default_rng(7).permutation(len(rows))
    shuffled = run(backend, [rows[index] for index in order])
    assert np.abs(shuffled - together[order]).max() <= 1e-5
    for chosen in (order[:1], order[1:3], order[3:]):
        assert np.abs(run(backend, [rows[one] for one in chosen]) - together[chosen]).max() <= 1e-5


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("name", NAMES)
def test_every_pooling_equals_the_reference(name: str, pooling: str, tmp_path: Path) -> None:
    bundle = add(name, tmp_path, pooling=pooling)
    table = pq.read_table(FAMILIES / f"{name}.parquet")
    actual = run(load(bundle, "onnxruntime"), table["input_ids"].to_pylist())
    assert_equal(actual, vectors(table, pooling))
    onnx.checker.check_model(str(bundle.graph), full_check=True)


@pytest.mark.parametrize("pooling", ["", "mean", "cls", "lasttoken"])
@pytest.mark.parametrize("name", ["distilbert", "roberta", "xlm_roberta"])
def test_graphs_without_padding_equal_the_reference(
    name: str, pooling: str, tmp_path: Path
) -> None:
    bundle = add(name, tmp_path, pooling=pooling)
    assert bundle.family in PACKED_FAMILIES
    table = pq.read_table(FAMILIES / f"{name}.parquet")
    config = BackendConfig(
        backend="onnxruntime",
        bundle=str(bundle.folder),
        threads=1,
        max_batch_tokens=16,
        device="cpu",
    )
    actual = run(load_twin(config), table["input_ids"].to_pylist())
    assert_equal(actual, vectors(table, pooling or "sentence"))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    bundle = add(name, tmp_path)
    table = pq.read_table(FAMILIES / f"{name}.parquet").to_pylist()
    expected = [row["input_ids"] for row in table if row["text"] is not None]
    texts = [row["text"] for row in table if row["text"] is not None]
    data = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, data)])
    encoded = Tokenizer.from_bundle(bundle.folder).encode(TextBatch(b"".join(data), offsets))
    actual = np.split(encoded.input_ids, encoded.offsets[1:-1])
    assert [ids.tolist() for ids in actual] == expected
