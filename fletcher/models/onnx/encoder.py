"""What a graph does to each token alone, however its tokens are laid out in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fletcher.models.onnx.architecture import Style
from fletcher.models.onnx.graph import GraphBuilder

# By their names in checkpoints: the operator that ends them, and its attributes.
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
        activation: One of ACTIVATIONS; empty: none.
    """

    weight: Array
    bias: Array | None
    activation: str


class Tensors(Protocol):
    """A model's weights, by what they do in a graph.

    Names are `embeddings.words` and `embeddings.positions`, float32 [rows, H], and
    `embeddings.types` [1, H], the first token type's row, which is part of `embeddings.positions`
    where there is that; `embeddings.norm`, `layer.N.attention.norm`, `layer.N.norm` and
    `final.norm` with `.scale` and `.bias`, [H]; `layer.N.q.norm` and `layer.N.k.norm` with
    `.scale`, [width of a head]; `layer.N.` with `q`, `k`, `v`, `projected`, `wide`, `gate` or
    `narrow`, each with `.weight` [from, to] and `.bias` [to]; and `distances`, [buckets, heads].
    The attention's scale is in `q` and, where queries are normalised, in `q.norm`.
    """

    def read_tensor(self, name: str) -> Array:
        """The tensor of that name, float32.

        Raises:
            ModelError: It is not there or not of the right shape.
        """
        ...


class EncoderLayers:
    """Writes products, norms and the second half of layers into a graph.

    Args:
        graph: To write to.
        tensors: Where weights come from.
        style: Which norms and which MLP.
    """

    def __init__(self, graph: GraphBuilder, tensors: Tensors, style: Style) -> None:
        self.graph = graph
        self.tensors = tensors
        self.style = style
        self._constants: dict[str, str] = {}

    def weight(self, name: str) -> str:
        """A tensor as a constant of the same name."""
        return self.graph.constant(name, self.tensors.read_tensor(name))

    def scalar(self, name: str, value: float) -> str:
        """A number as a constant, float32 [1]; asked for again, the same one."""
        if name not in self._constants:
            constant = self.graph.constant(name, np.array([value], np.float32))
            self._constants[name] = constant
        return self._constants[name]

    def product(self, value: str, name: str) -> str:
        """`value` times the weight of `name`, and its bias added where it has one."""
        graph, weight = self.graph, self.weight(f"{name}.weight")
        if name.rpartition(".")[2] not in self.style.biases:
            return graph.node("MatMul", (value, weight), name)
        product = graph.node("MatMul", (value, weight), f"{name}.product")
        return graph.node("Add", (product, self.weight(f"{name}.bias")), name)

    def norm(self, value: str, name: str) -> str:
        """The model's norm over the last axis."""
        if self.style.rms_norm:
            return self.rms_norm(value, name)
        parts = ("scale", "bias") if self.style.norm_bias else ("scale",)
        weights = [self.weight(f"{name}.{part}") for part in parts]
        return self.graph.node(
            "LayerNormalization", (value, *weights), name, axis=-1, epsilon=self.style.epsilon
        )

    def rms_norm(self, value: str, name: str) -> str:
        """RMS norm over the last axis: of the operators that both engines fuse into one."""
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
        """An activation function, one of ACTIVATIONS."""
        operator, attributes = ACTIVATIONS[activation]
        inputs: tuple[str, ...] = (value,)
        if activation == "silu":
            inputs = (value, self.graph.node("Sigmoid", (value,), f"{name}.sigmoid"))
        return self.graph.node(operator, inputs, name, **attributes)

    def dense(self, value: str, dense: Dense, name: str) -> str:
        """A linear layer after pooling, called `name`."""
        graph = self.graph
        weight = graph.constant(f"{name}.weight", dense.weight)
        value = graph.node("MatMul", (value, weight), f"{name}.product")
        if dense.bias is not None:
            bias = graph.constant(f"{name}.bias", dense.bias)
            value = graph.node("Add", (value, bias), f"{name}.sum")
        return self.activate(value, name, dense.activation) if dense.activation else value

    def mlp(self, layer: str, value: str) -> str:
        """The two or three products of a layer's MLP, [..., H]."""
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
        """The rest of a layer.

        Args:
            name: `layer.N`.
            attended: What its attention gives, [..., heads x width].
            residual: The layer's input at the same tokens, [..., H].
        """
        graph, first = self.graph, self.style.norm_first
        projected = self.product(attended, f"{name}.projected")
        middle = graph.node("Add", (projected, residual), f"{name}.attention.sum")
        if not first:
            middle = self.norm(middle, f"{name}.attention.norm")
        asked = self.norm(middle, f"{name}.norm") if first else middle
        total = graph.node("Add", (self.mlp(name, asked), middle), f"{name}.sum")
        return total if first else self.norm(total, f"{name}.norm")
