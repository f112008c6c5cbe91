"""The weights of a written graph, read back."""

from pathlib import Path

import numpy as np

from fletcher.models.onnx.graph import GRAPH_FILE, GraphBuilder
from fletcher.models.onnx.written import WrittenBert


def test_older_graphs_with_joined_products_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((16, 48), dtype=np.float32)
    both = rng.standard_normal(32, dtype=np.float32)
    with GraphBuilder(tmp_path, "bert") as graph:
        value = graph.input("value", np.float32, (1, 16))
        graph.constant("shape.heads", [0, 0, 4, 4])
        graph.constant("layer.0.qkv.weight", weights)
        graph.constant("layer.1.kv.bias", both)
        scale = graph.constant("scale", np.ones(16, np.float32))
        graph.node("LayerNormalization", (value, scale), "embeddings.norm", epsilon=1e-5)
        graph.node("Relu", (value,), "layer.0.active")
        graph.save()
    written = WrittenBert(tmp_path / GRAPH_FILE)
    assert (written.num_heads, written.activation) == (4, "relu")
    assert np.array_equal(written.read_tensor("layer.0.k.weight"), weights[:, 16:32])
    assert np.array_equal(written.read_tensor("layer.1.v.bias"), both[16:])
