"""Weights and parameters of a BERT graph that Fletcher wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count, takewhile
from pathlib import Path

import numpy as np

from fletcher.errors import ModelError
from fletcher.models.bundle.files import is_inside
from fletcher.models.onnx.encoder import ACTIVATIONS, Array, Dense
from fletcher.models.onnx.graph import read_model
from fletcher.models.onnx.onnx_pb2 import NodeProto

_FUSED = {"q": 0, "k": 1, "v": 2}


class WrittenBert:
    """A bundle's BERT graph, which provides its weights as `encoder.Tensors`.

    A second graph of the model can be written from these weights. The bundle's checksums cover
    them.

    Args:
        graph: Path of the ONNX file. The file of its weights must be in the same folder.

    Attributes:
        epsilon: Epsilon of layer norms.
        activation: Activation function, one of ACTIVATIONS.
        num_heads: Number of attention heads.
        hidden: Width of hidden states.
        dense: Linear layers after pooling.

    Raises:
        ModelError: The file was not written by `write_model` for a model of `packed.FAMILIES`.
    """

    def __init__(self, graph: Path) -> None:
        self._folder = graph.parent
        try:
            whole = read_model(graph).graph
            self._tensors = {one.name: one for one in whole.initializer}
            nodes = {one.name: one for one in whole.node}
            norm = nodes["embeddings.norm"].attribute
            self.epsilon = {one.name: one.f for one in norm}["epsilon"]
            self.activation = _activation(nodes["layer.0.active"])
            heads = np.frombuffer(self._tensors["shape.heads"].raw_data, np.int64).tolist()
            self.num_heads, width = heads[2:]
            self.hidden = self.num_heads * width
            names: Iterable[str] = (f"dense.{index}" for index in count())
            names = takewhile(lambda name: f"{name}.weight" in self._tensors, names)
            self.dense = [self._dense(name, nodes) for name in names]
        except (OSError, KeyError, IndexError, ValueError) as error:
            raise ModelError(
                f"{graph.name} is no BERT graph that this Fletcher wrote "
                f"({type(error).__name__}: {error}); add the model again with `fletcher model add`"
            ) from error

    def read_tensor(self, name: str) -> Array:
        if name in self._tensors:
            return self._read(name)
        # Older graphs have one joined tensor for queries, keys and values, or for keys and values.
        layer, part, kind = name.rsplit(".", 2)
        joined = f"{layer}.qkv.{kind}"
        if joined in self._tensors:
            return np.split(self._read(joined), 3, axis=-1)[_FUSED[part]]
        return np.split(self._read(f"{layer}.kv.{kind}"), 2, axis=-1)[_FUSED[part] - 1]

    def _dense(self, name: str, nodes: Mapping[str, NodeProto]) -> Dense:
        bias = self._read(f"{name}.bias") if f"{name}.bias" in self._tensors else None
        active = _activation(nodes[name]) if name in nodes else ""
        return Dense(self._read(f"{name}.weight"), bias, active)

    def _read(self, name: str) -> Array:
        try:
            tensor = self._tensors[name]
            place = {one.key: one.value for one in tensor.external_data}
            if not place:
                return np.frombuffer(tensor.raw_data, np.float32).reshape(tensor.dims)
            if not is_inside(place["location"]):
                raise ValueError("its weights lie outside the bundle")
            path, offset = self._folder / place["location"], int(place["offset"])
            # Mapped, so that only one tensor of a large model is in memory at a time.
            return np.memmap(path, np.float32, "r", offset, tuple(tensor.dims))
        except (OSError, KeyError, ValueError) as error:
            raise ModelError(
                f"the weights of `{name}` cannot be read ({type(error).__name__}); add the model "
                "again with `fletcher model add`"
            ) from error


def _activation(node: NodeProto) -> str:
    texts = {one.name: one.s.decode() for one in node.attribute}
    for name, written in ACTIVATIONS.items():
        if written == (node.op_type, texts):
            return name
    raise ValueError(f"activation {node.op_type}")
