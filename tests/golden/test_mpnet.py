"""The real all-mpnet-base-v2 equals sentence-transformers in float32 and in bfloat16.

Needs the model in FLETCHER_HOME under its name, else it is skipped: CONTRIBUTING.md says how to add
it. The same graph with other weights is in test_wide.py, which is never skipped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fletcher.config.server import fletcher_home
from fletcher.core.batches import TextBatch
from fletcher.errors import UnknownModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from fletcher.tokenization.tokenizer import Tokenizer

from .bfloat16 import rounded
from .onnx_session import Array, cosines, run_graph

TABLE = pq.read_table(Path(__file__).parent / "mpnet.parquet")
NAME = "all-mpnet-base-v2"


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    try:
        return Registry(fletcher_home() / "models").get_model(NAME)
    except UnknownModelError:
        pytest.skip(f"{NAME} is not installed; see CONTRIBUTING.md")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_texts_alone_and_in_company(bundle: ModelBundle, precision: str, tmp_path: Path) -> None:
    data = [text.encode() for text in TABLE["text"].to_pylist()]
    offsets = np.cumsum([0, *map(len, data)])
    tokens = Tokenizer.from_bundle(bundle.folder).encode(TextBatch(b"".join(data), offsets))
    rows = [ids.tolist() for ids in np.split(tokens.input_ids, tokens.offsets[1:-1])]
    assert {len(row) for row in rows} >= {2, bundle.max_length}
    expected: Array = np.array(TABLE["vector"].to_pylist(), np.float32)
    graph = rounded(bundle.graph, tmp_path) if precision == "bfloat16" else bundle.graph
    together = cosines(run_graph(graph, rows)["embedding"], expected)
    assert together.min() >= 0.999
    assert together.mean() >= 0.9999
    for place in (1, len(rows) - 1):
        alone = run_graph(graph, [rows[place]])["embedding"]
        assert cosines(alone, expected[place : place + 1])[0] >= 0.999
