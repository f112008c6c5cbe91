"""Parts of graphs that process each token separately, for any layout of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fletcher.models.onnx.architecture import Style
from fletcher.models.onnx.graph import GraphBuilder

# Activation functions by their names in checkpoints. A value has the function's last operator and
# this operator's attributes.
ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
    "silu": ("Mul", {}),
    "tanh": ("Tanh", {}),
}

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer after pooling.

    Attributes:
        weight: float32 [from, to].
        bias: float32 [to], or None.
        activation: Activation function, one of ACTIVATIONS; empty for none.
    """

    weight: Array
    bias: Array | None
    activation: str


class Tensors(Protocol):
    """A model's weights, named by their role in a graph. All are float32.

    - `embeddings.words` and `embeddings.positions`, [rows, H], and `embeddings.types`, [1, H], the
      embedding of the first token type. `embeddings.types` is already added to
      `embeddings.positions`.
    - `embeddings.norm`, `layer.N.attention.norm`, `layer.N.norm` and `final.norm`, each with
      `.scale` and `.bias`, [H].
    - `layer.N.q.norm` and `layer.N.k.norm`, each with `.scale`, [width of a head].
    - `layer.N.` with `q`, `k`, `v`, `projected`, `wide`, `gate` or `narrow`, each with `.weight`,
      [from, to], and `.bias`, [to].
    - `distances`, [buckets, heads].

    `q` is already multiplied by the attention's scale. If queries have a norm, `q.norm` is
    multiplied by the scale instead.
    """

    def read_tensor(self, name: str) -> Array:
        """Return the tensor called `name`, float32.

        Raises:
            ModelError: The tensor is missing or has the wrong shape.
        """
        ...


class EncoderLayers:
    """Writer of linear layers, norms and the part of a layer after its attention."""

    def __init__(self, graph: GraphBuilder, tensors: Tensors, style: Style) -> None:
        self.graph = graph
        self.tensors = tensors
        self.style = style
        self._constants: dict[str, str] = {}

    def weight(self, name: str) -> str:
        """Add a tensor to the graph as a constant of the same name."""
        return self.graph.constant(name, self.tensors.read_tensor(name))

    def scalar(self, name: str, value: float) -> str:
        """Add a number as a constant, float32 [1]; later calls return the same constant."""
        if name not in self._constants:
            constant = self.graph.constant(name, np.array([value], np.float32))
            self._constants[name] = constant
        return self._constants[name]

    def product(self, value: str, name: str) -> str:
        """Product of `value` and the weight of layer `name`, plus the layer's bias if any."""
        graph, weight = self.graph, self.weight(f"{name}.weight")
        if name.rpartition(".")[2] not in self.style.biases:
            return graph.node("MatMul", (value, weight), name)
        product = graph.node("MatMul", (value, weight), f"{name}.product")
        return graph.node("Add", (product, self.weight(f"{name}.bias")), name)

    def norm(self, value: str, name: str) -> str:
        """Norm over the last axis, of the kind that the model has."""
        if self.style.rms_norm:
            return self.rms_norm(value, name)
        parts = ("scale", "bias") if self.style.norm_bias else ("scale",)
        weights = [self.weight(f"{name}.{part}") for part in parts]
        return self.graph.node(
            "LayerNormalization", (value, *weights), name, axis=-1, epsilon=self.style.epsilon
        )

    def rms_norm(self, value: str, name: str) -> str:
        """RMS norm over the last axis, as operators that both engines fuse into one."""
        graph = self.graph
        two, epsilon = self.scalar("two", 2), self.scalar("epsilon", self.style.epsilon)
        last = graph.constant(f"{name}.axis", [-1])
        squares = graph.node("Pow", (value, two), f"{name}.squares")
        mean = graph.node("ReduceMean", (squares, last), f"{name}.mean", keepdims=1)
        variance = graph.node("Add", (mean, epsilon), f"{name}.variance")
        root = graph.node("Sqrt", (variance,), f"{name}.root")
        divided = graph.node("Div", (value, root), f"{name}.divided")
        return graph.node("Mul", (divided, self.weight(f"{name}.scale")), name)

    def activate(self, value: str, name: str, activation: str) -> str:
        """Apply `activation`, one of ACTIVATIONS, to `value`."""
        operator, attributes = ACTIVATIONS[activation]
        inputs: tuple[str, ...] = (value,)
        if activation == "silu":
            inputs = (value, self.graph.node("Sigmoid", (value,), f"{name}.sigmoid"))
        return self.graph.node(operator, inputs, name, **attributes)

    def dense(self, value: str, dense: Dense, name: str) -> str:
        """Apply one linear layer that follows pooling; `name` prefixes its values."""
        graph = self.graph
        weight = graph.constant(f"{name}.weight", dense.weight)
        value = graph.node("MatMul", (value, weight), f"{name}.product")
        if dense.bias is not None:
            bias = graph.constant(f"{name}.bias", dense.bias)
            value = graph.node("Add", (value, bias), f"{name}.sum")
        return self.activate(value, name, dense.activation) if dense.activation else value

    def denses(self, value: str, layers: Sequence[Dense], width: int) -> tuple[str, int]:
        """Apply the linear layers that follow pooling; return the result and its width.

        `width` is the width of `value`.
        """
        for index, one in enumerate(layers):
            value, width = self.dense(value, one, f"dense.{index}"), one.weight.shape[1]
        return value, width

    def mlp(self, layer: str, value: str) -> str:
        """Output of a layer's MLP, [..., H]: two products, or three if the MLP is gated."""
        graph, activation = self.graph, self.style.activation
        wide = self.product(value, f"{layer}.wide")
        if self.style.gated:
            gate = self.product(value, f"{layer}.gate")
            active = self.activate(gate, f"{layer}.active", activation)
            active = graph.node("Mul", (active, wide), f"{layer}.gated")
        else:
            active = self.activate(wide, f"{layer}.active", activation)
        return self.product(active, f"{layer}.narrow")

    def after_attention(self, name: str, attended: str, residual: str) -> str:
        """Write the part of a layer after its attention; return the output, [..., H].

        `name` is the layer's, such as `layer.0`. `attended` is the attention's output,
        [..., heads x width]. `residual` is the layer's input for the same tokens, [..., H].
        """
        graph, first = self.graph, self.style.norm_first
        projected = self.product(attended, f"{name}.projected")
        middle = graph.node("Add", (projected, residual), f"{name}.attention.sum")
        if not first:
            middle = self.norm(middle, f"{name}.attention.norm")
        asked = self.norm(middle, f"{name}.norm") if first else middle
        total = graph.node("Add", (self.mlp(name, asked), middle), f"{name}.sum")
        return total if first else self.norm(total, f"{name}.norm")
