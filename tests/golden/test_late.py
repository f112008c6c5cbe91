"""Parts of rows, pooled after the model read the whole: what references make of them.

References are tests/golden/late.parquet, made by scripts/make_golden_late.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest

from fletcher.core.batches import MicroBatch, Spans, TextBatch
from fletcher.core.chunking import Chunking
from fletcher.errors import BackendError, ModelError
from fletcher.inference.backend import Backend, BackendConfig
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from fletcher.models.onnx import writer
from fletcher.tokenization.tokenizer import Tokenizer

from .onnx_session import Array
from .test_families import add, assert_equal, load

GOLDEN = Path(__file__).parent
ROWS = pq.read_table(GOLDEN / "late.parquet").to_pylist()
FAMILIES = sorted({row["family"] for row in ROWS})
ENGINES = ["onnxruntime", "openvino"]
Bounds = Sequence[tuple[int, int]]


def load_late(bundle: ModelBundle, engine: str, precision: str = "float32") -> Backend:
    module = importlib.import_module(f"fletcher.inference.{engine}")
    config = BackendConfig(
        backend=engine,
        bundle=str(bundle.folder),
        threads=1,
        max_batch_tokens=16,
        device="cpu",
        precision=precision,
        late=True,
    )
    loaded: Backend = module.load(config)
    return loaded


def run(backend: Backend, rows: Sequence[Sequence[int]], bounds: Sequence[Bounds]) -> list[Array]:
    counts = np.array([len(one) for one in bounds], np.int32)
    flat = np.array([pair for one in bounds for pair in one], np.int32)
    ids = np.concatenate([np.array(row, np.int32) for row in rows])
    lengths = np.array([len(row) for row in rows], np.int32)
    result = backend.run(MicroBatch(ids, lengths, spans=Spans(counts, flat)))
    assert (result.norms, result.counts) == (None, None)
    return np.split(result.embeddings, np.cumsum(counts)[:-1])


def test_these_families_have_a_reference() -> None:
    assert FAMILIES == ["distilbert", "jina_bert", "mpnet", "nomic_bert", "xlm_roberta"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_spans_equal_the_reference_in_any_batch(family: str, engine: str, tmp_path: Path) -> None:
    bundle = add(family, tmp_path)
    assert bundle.late is not None
    golden = [row for row in ROWS if row["family"] == family]
    rows, bounds = ([row[one] for row in golden] for one in ("input_ids", "bounds"))
    assert max(len(row) for row in rows) == 130
    late = load_late(bundle, engine)
    together = run(late, rows, bounds)
    for found, row in zip(together, golden, strict=True):
        assert_equal(found, np.array(row["vectors"], np.float32))
    for place in np.random.default_rng(5).permutation(len(rows)):
        (alone,) = run(late, [rows[place]], [bounds[place][::-1]])
        assert np.abs(alone[::-1] - together[place]).max() <= 1e-5
    # A part that is the whole row is what the row gets otherwise.
    ids = np.concatenate([np.array(row, np.int32) for row in rows])
    whole = load(bundle, engine).run(MicroBatch(ids, np.array([len(r) for r in rows], np.int32)))
    norms = 1 if whole.norms is None else whole.norms[:, None]
    assert np.abs(np.array([one[0] for one in together]) - whole.embeddings * norms).max() < 1e-5
    onnx.checker.check_model(str(bundle.late), full_check=True)


def test_bfloat16_is_near(tmp_path: Path) -> None:
    bundle = add("mpnet", tmp_path)
    golden = [row for row in ROWS if row["family"] == "mpnet"]
    try:
        late = load_late(bundle, "openvino", "bfloat16")
    except BackendError as error:
        pytest.skip(error.message)
    found = run(late, *([row[one] for row in golden] for one in ("input_ids", "bounds")))
    exact = [np.array(row["vectors"], np.float32) for row in golden]
    assert_close = [
        np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        for a, b in zip(found, exact, strict=True)
    ]
    assert np.concatenate(assert_close).min() >= 0.999


@pytest.mark.parametrize("how", ["each-sentence:none:late", "tokens:12/3:none:late"])
def test_from_text_to_vectors(how: str, tmp_path: Path) -> None:
    """The parts of a text longer than the window, each pooled from a row that has it whole."""
    bundle = add("xlm_roberta", tmp_path)
    chunking = Chunking.from_text(how)
    assert chunking is not None
    data = ("A game of boards. It holds 12 players and more! " * 30).encode()
    tokenizer, late = Tokenizer.from_bundle(bundle.folder), load_late(bundle, "onnxruntime")
    batch = TextBatch(data, np.array([0, len(data)]), chunking=chunking.fitted(130, 2))
    tokens = tokenizer.encode(batch)
    spans, chunks = tokens.spans, tokens.chunks
    assert spans is not None
    assert chunks is not None
    assert tokens.num_texts > 2
    found = late.run(MicroBatch(tokens.input_ids, tokens.token_count, spans=spans)).embeddings
    assert len(found) == len(chunks.index)
    row_of = np.repeat(np.arange(tokens.num_texts), spans.counts)
    text = tokenizer._tokenizer.encode(data.decode(), add_special_tokens=False)
    for chunk, (row, (a, b)) in enumerate(zip(row_of, spans.bounds, strict=True)):
        ids = tokens.input_ids[tokens.offsets[row] : tokens.offsets[row + 1]]
        begins, ends = chunks.text_ranges[chunk, :2]
        own = [
            n
            for n, (first, last) in zip(text.ids, text.offsets, strict=True)
            if begins < last <= ends
        ]
        first_one, last_one = chunk == 0, chunk == len(found) - 1
        assert ids[a + first_one : b - last_one].tolist() == own
        if chunk % 7 == 0 or last_one:
            (alone,) = run(late, [ids.tolist()], [[(a, b)]])
            assert np.abs(alone[0] - found[chunk]).max() < 1e-5


def test_late_chunking_does_not_change_the_graph_for_whole_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Registry(tmp_path / "both").add_model(
        str(GOLDEN / "families" / "distilbert"), progress=print
    )
    monkeypatch.setattr(writer, "write_late", lambda *_: None)
    alone = Registry(tmp_path / "alone").add_model(
        str(GOLDEN / "families" / "distilbert"), progress=print
    )
    for name in ("model.onnx", "model.weights"):
        assert (both.folder / name).read_bytes() == (alone.folder / name).read_bytes()
    assert both.hash == alone.hash


def test_other_bundles_have_none(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "models")
    assert add("qwen3", tmp_path).late is None
    exits = registry.add_model(str(GOLDEN / "tiny"), name="exits", exits=(1,), progress=print)
    assert exits.late is None
    with pytest.raises(ModelError, match="no graph for late chunking"):
        load_late(exits, "onnxruntime")
