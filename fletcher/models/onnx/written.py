"""Reads back a BERT graph that Fletcher wrote: its weights and the numbers that shape it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

import numpy as np

from fletcher.errors import ModelError
from fletcher.models.bundle.files import is_inside
from fletcher.models.onnx.encoder import ACTIVATIONS, Array, Dense
from fletcher.models.onnx.protowire import WireError, WireMessage

# Field numbers of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER = 7, 1, 5
_NODE_NAME, _NODE_OPERATOR, _NODE_ATTRIBUTE = 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_STRING = 1, 2, 4
_TENSOR_DIMS, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 8, 9, 13
_FUSED = {"q": 0, "k": 1, "v": 2}


class WrittenBert:
    """A bundle's BERT graph, weights as `encoder.Tensors`.

    So other graphs of a model are made of its bundle alone, whose checksums cover them.

    Args:
        graph: The ONNX file; its weights lie beside it.

    Attributes:
        epsilon: Of layer norms.
        activation: One of ACTIVATIONS.
        num_heads: Attention heads.
        hidden: Width of hidden states.
        dense: Linear layers after pooling.

    Raises:
        ModelError: The file is not one that `write_model` wrote for one of `packed.FAMILIES`.
    """

    def __init__(self, graph: Path) -> None:
        self._folder = graph.parent
        try:
            whole = WireMessage(memoryview(graph.read_bytes())).messages(_MODEL_GRAPH)[0]
            self._tensors = {
                one.text(_TENSOR_NAME): one for one in whole.messages(_GRAPH_INITIALIZER)
            }
            nodes = {one.text(_NODE_NAME): one for one in whole.messages(_GRAPH_NODE)}
            self.epsilon = _attributes(nodes["embeddings.norm"])["epsilon"].float32(
                _ATTRIBUTE_FLOAT
            )
            self.activation = _activation(nodes["layer.0.active"])
            self.num_heads, width = self._integers("shape.heads")[2:]
            self.hidden = self.num_heads * width
            self.dense = [self._dense(name, nodes) for name in self._dense_names()]
        except (OSError, WireError, KeyError, IndexError, ValueError) as error:
            raise ModelError(
                f"{graph.name} is no BERT graph that this Fletcher wrote "
                f"({type(error).__name__}: {error}); add the model again with `fletcher model add`"
            ) from error

    def get(self, name: str) -> Array:
        if name in self._tensors:
            return self._read(name)
        # Graphs of before had queries, keys and values side by side in one tensor, or the last two.
        layer, part, kind = name.rsplit(".", 2)
        joined = f"{layer}.qkv.{kind}"
        if joined in self._tensors:
            return np.split(self._read(joined), 3, axis=-1)[_FUSED[part]]
        return np.split(self._read(f"{layer}.kv.{kind}"), 2, axis=-1)[_FUSED[part] - 1]

    def _dense_names(self) -> Iterator[str]:
        for index in count():
            if f"dense.{index}.weight" not in self._tensors:
                return
            yield f"dense.{index}"

    def _dense(self, name: str, nodes: Mapping[str, WireMessage]) -> Dense:
        bias = self._read(f"{name}.bias") if f"{name}.bias" in self._tensors else None
        active = _activation(nodes[name]) if name in nodes else ""
        return Dense(self._read(f"{name}.weight"), bias, active)

    def _read(self, name: str) -> Array:
        try:
            tensor = self._tensors[name]
            shape = tensor.numbers(_TENSOR_DIMS)
            place = {one.text(1): one.text(2) for one in tensor.messages(_TENSOR_EXTERNAL)}
            if not place:
                return np.frombuffer(tensor.data(_TENSOR_RAW), np.float32).reshape(shape)
            if not is_inside(place["location"]):
                raise ValueError("its weights lie outside the bundle")
            path, offset = self._folder / place["location"], int(place["offset"])
            # Mapped: of a large model only one tensor at a time is in memory.
            return np.memmap(path, np.float32, "r", offset, tuple(shape))
        except (OSError, WireError, KeyError, ValueError) as error:
            raise ModelError(
                f"the weights of `{name}` cannot be read ({type(error).__name__}); add the model "
                "again with `fletcher model add`"
            ) from error

    def _integers(self, name: str) -> list[int]:
        raw = self._tensors[name].data(_TENSOR_RAW)
        return [int(one) for one in np.frombuffer(raw, np.int64)]


def _attributes(node: WireMessage) -> dict[str, WireMessage]:
    return {one.text(_ATTRIBUTE_NAME): one for one in node.messages(_NODE_ATTRIBUTE)}


def _activation(node: WireMessage) -> str:
    texts = {
        name: attribute.text(_ATTRIBUTE_STRING) for name, attribute in _attributes(node).items()
    }
    for name, written in ACTIVATIONS.items():
        if written == (node.text(_NODE_OPERATOR), texts):
            return name
    raise ValueError(f"activation {node.text(_NODE_OPERATOR)}")
