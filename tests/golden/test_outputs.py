"""SPLADE's weights and ColBERT's token vectors are those of their references, on both engines.

Checkpoints and references are tests/golden/outputs, made by scripts/make_golden_outputs.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest

from fletcher.config.engine import EngineConfig
from fletcher.core.batches import InferenceResult, MicroBatch, TextBatch
from fletcher.errors import BackendError, ConfigError, ModelError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.budget import BudgetedBackend
from fletcher.inference.devices import resolve_replicas
from fletcher.inference.host import detect_host
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from fletcher.models.onnx.packed import can_pack
from fletcher.tokenization.tokenizer import Tokenizer
from fletcher.tuning.tuner import tune

OUTPUTS = Path(__file__).parent / "outputs"
ENGINES = ["onnxruntime", "openvino"]
MAX_ERROR = 1e-4


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelBundle]:
    registry = Registry(tmp_path_factory.mktemp("models"))
    return {
        name: registry.add_model(str(OUTPUTS / name), progress=print)
        for name in ("splade", "colbert", "pylate")
    }


def run(
    bundle: ModelBundle,
    engine: str,
    texts: list[str],
    prompt: str = "",
    max_run_tokens: int = 10_000,
) -> InferenceResult:
    """All texts in one run, so that most are padded, or in runs of so many tokens."""
    module = importlib.import_module(f"fletcher.inference.{engine}")
    config = BackendConfig(
        backend=engine, bundle=str(bundle.folder), threads=1, max_batch_tokens=64, device="cpu"
    )
    data = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, data)]).astype(np.int64)
    tokens = Tokenizer.from_bundle(bundle.folder).encode(
        TextBatch(b"".join(data), offsets, prompt=bundle.prompts.get(prompt, ""))
    )
    backend = BudgetedBackend(module.load(config), max_run_tokens)
    return backend.run(MicroBatch(tokens.input_ids, tokens.token_count))


@pytest.mark.parametrize("engine", ENGINES)
def test_splade(bundles: dict[str, ModelBundle], engine: str) -> None:
    bundle = bundles["splade"]
    onnx.checker.check_model(str(bundle.graph), full_check=True)
    assert (bundle.output, bundle.dims) == ("sparse", (bundle.dim,))
    table = pq.read_table(OUTPUTS / "splade.parquet")
    expected = np.array(table["weights"].to_pylist(), np.float32)
    result = run(bundle, engine, table["text"].to_pylist())
    assert result.counts is not None
    rows = np.repeat(np.arange(len(expected)), result.counts)
    actual = np.zeros_like(expected)
    actual[rows, result.embeddings[:, 0].astype(int)] = result.embeddings[:, 1]
    assert np.abs(actual - expected).max() <= MAX_ERROR
    assert (result.embeddings[:, 1] > 0).all()
    assert 0 < len(rows) < expected.size


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["colbert", "pylate"])
def test_colbert(bundles: dict[str, ModelBundle], name: str, engine: str) -> None:
    bundle = bundles[name]
    onnx.checker.check_model(str(bundle.graph), full_check=True)
    assert (bundle.output, bundle.dim, bundle.max_length) == ("multi", 8, 32)
    assert bundle.default_prompt == "document"
    rows = pq.read_table(OUTPUTS / f"{name}.parquet").to_pylist()
    counts = {}
    for prompt in ("query", "document"):
        wanted = [row for row in rows if row["prompt"] == prompt]
        result = run(bundle, engine, [row["text"] for row in wanted], prompt)
        assert result.counts is not None
        assert result.counts.tolist() == [len(row["vectors"]) for row in wanted]
        expected = np.concatenate([np.array(row["vectors"], np.float32) for row in wanted])
        assert np.abs(result.embeddings - expected).max() <= MAX_ERROR
        counts[prompt] = result.counts
    # Documents leave out what punctuation the tokenizer knows; queries are filled up, or cut.
    assert counts["document"].tolist() == [3, 4, 6, 10, 32]
    assert counts["query"].tolist() == [16] * 5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["colbert", "pylate"])
def test_queries_and_documents_in_one_run(
    bundles: dict[str, ModelBundle], name: str, engine: str
) -> None:
    bundle = bundles[name]
    rows = pq.read_table(OUTPUTS / f"{name}.parquet").to_pylist()
    rows = [rows[index] for index in np.random.default_rng(1).permutation(len(rows))]
    # The markers are tokens wherever they stand, so they can be put before texts by hand.
    texts = [bundle.prompts[row["prompt"]] + row["text"] for row in rows]
    short = [n for n, row in enumerate(rows) if len(row["text"]) < 100]
    result = run(bundle, engine, [texts[n] for n in short])
    assert result.counts is not None
    parts = np.split(result.embeddings, np.cumsum(result.counts)[:-1])
    for n, vectors in zip(short, parts, strict=True):
        assert np.abs(vectors - np.array(rows[n]["vectors"], np.float32)).max() <= MAX_ERROR


def test_what_a_checkpoint_says_of_queries_is_done(tmp_path: Path) -> None:
    def added(name: str, file: str, **change: object) -> ModelBundle:
        checkpoint = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(OUTPUTS / name, checkpoint)
        path = checkpoint / file
        fields = json.loads(path.read_text()) | change
        path.write_text(json.dumps({key: one for key, one in fields.items() if one is not None}))
        return Registry(tmp_path / "models").add_model(str(checkpoint), progress=print)

    settings = "config_sentence_transformers.json"
    plain = added("pylate", settings, do_query_expansion=False)
    assert plain.queries is not None
    assert (plain.queries.length, plain.queries.filler) == (16, None)
    counts = run(plain, "onnxruntime", ["vector", "search " * 40], "query").counts
    assert counts is not None
    assert counts.tolist() == [4, 16]
    # What is not said is as the library takes it, within what the model reads.
    usual = added("pylate", settings, query_length=None, document_length=None, skiplist_words=None)
    assert usual.queries is not None
    assert (usual.queries.length, usual.max_length) == (32, 32)
    assert usual.skipped is not None
    seen = added("colbert", "artifact.metadata", attend_to_mask_tokens=True)
    assert seen.queries is not None
    assert seen.queries.attended
    same = added("colbert", "artifact.metadata")
    assert len({plain.hash, usual.hash, seen.hash, same.hash}) == 4
    nameless = tmp_path / "nameless"
    shutil.copytree(OUTPUTS / "colbert", nameless)
    (nameless / "tokenizer_config.json").write_text("{}")
    words = (nameless / "tokenizer.json").read_text().replace('"[MASK]"', '"[OTHER]"')
    (nameless / "tokenizer.json").write_text(words)
    with pytest.raises(ModelError, match="has no mask token, which fills short queries"):
        Registry(tmp_path / "models").add_model(str(nameless), progress=print)


def test_outputs_are_part_of_what_a_model_is(
    bundles: dict[str, ModelBundle], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "colbert"
    shutil.copytree(OUTPUTS / "colbert", checkpoint)
    path = checkpoint / "artifact.metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_punctuation": False}))
    other = Registry(tmp_path / "models").add_model(str(checkpoint), progress=print)
    assert other.skipped is None
    assert other.hash != bundles["colbert"].hash


@pytest.mark.parametrize("name", ["splade", "colbert"])
def test_a_batch_split_for_lack_of_memory_gives_the_same_vectors(
    bundles: dict[str, ModelBundle], name: str
) -> None:
    texts = pq.read_table(OUTPUTS / f"{name}.parquet")["text"].to_pylist()
    whole = run(bundles[name], "onnxruntime", texts)
    cut = run(bundles[name], "onnxruntime", texts, max_run_tokens=40)
    assert whole.counts is not None
    assert np.array_equal(whole.counts, cut.counts)
    assert np.abs(whole.embeddings - cut.embeddings).max() <= 1e-5


@pytest.mark.parametrize("name", ["splade", "colbert"])
def test_what_is_for_dense_vectors_refuses_others(
    bundles: dict[str, ModelBundle], name: str, tmp_path: Path
) -> None:
    bundle, host = bundles[name], detect_host()
    assert not can_pack(bundle)
    with pytest.raises(BackendError, match=f"null makes dense vectors, {name} gives"):
        resolve_replicas(EngineConfig(device="cpu", backend="null"), host, bundle)
    with pytest.raises(ConfigError, match=f"`model` {name} gives {bundle.output} vectors"):
        tune(tmp_path, EngineConfig(), host, bundle, print)


def test_sparse_and_token_vectors_come_only_from_the_last_layer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="`exits` is given, but the model gives sparse vectors"):
        Registry(tmp_path).add_model(str(OUTPUTS / "splade"), exits=(1,), progress=print)


@pytest.mark.parametrize(
    ("name", "file", "change", "words"),
    [
        ("splade", "1_SpladePooling/config.json", {"pooling_strategy": "sum"}, "expected max"),
        ("colbert", "artifact.metadata", {"doc_token_id": "[D]"}, "`doc_token_id` '.D.'"),
        ("colbert", "artifact.metadata", {"query_maxlen": "x"}, "`query_maxlen` is 'x'"),
        ("colbert", "artifact.metadata", {"dim": 9}, r"shape \[8, 16\], config.json asks"),
        ("pylate", "config_sentence_transformers.json", {"query_prefix": None}, "no Pooling"),
        ("splade", "config.json", {"model_type": "roberta"}, "no tensor"),
    ],
)
def test_what_is_not_supported_is_refused(
    tmp_path: Path, name: str, file: str, change: dict[str, object], words: str
) -> None:
    checkpoint = tmp_path / name
    shutil.copytree(OUTPUTS / name, checkpoint)
    path = checkpoint / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=words):
        Registry(tmp_path / "models").add_model(str(checkpoint), progress=print)
