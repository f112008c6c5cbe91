"""What a BERT graph does to each token alone, however its tokens are laid out in memory."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from fletcher.models.graph import GraphBuilder

ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}

Array = npt.NDArray[np.float32]


class Tensors(Protocol):
    """A model's weights, by what they do in a graph.

    Names are `embeddings.words` and `embeddings.positions` (the first token type's embedding
    included), float32 [rows, H]; `embeddings.norm`, `layer.N.attention.norm` and `layer.N.norm`
    with `.scale` and `.bias`, [H]; and `layer.N.` with `q`, `k`, `v`, `projected`, `wide` or
    `narrow`, each with `.weight` [from, to] and `.bias` [to]; `q` has the attention's scale in it.
    """

    def get(self, name: str) -> Array:
        """The tensor of that name, float32.

        Raises:
            ModelError: It is not there or not of the right shape.
        """
        ...


class Encoder:
    """Writes products, norms and the second half of layers into a graph.

    Args:
        graph: To write to.
        tensors: Where weights come from.
        epsilon: Of layer norms.
        activation: One of ACTIVATIONS.
    """

    def __init__(
        self, graph: GraphBuilder, tensors: Tensors, *, epsilon: float, activation: str
    ) -> None:
        self.graph = graph
        self.tensors = tensors
        self.epsilon = epsilon
        self.operator, self.attributes = ACTIVATIONS[activation]

    def weight(self, name: str) -> str:
        """A tensor as a constant of the same name."""
        return self.graph.constant(name, self.tensors.get(name))

    def product(self, value: str, name: str) -> str:
        """`value` times the weight of `name`, and its bias added."""
        graph = self.graph
        product = graph.node("MatMul", (value, self.weight(f"{name}.weight")), f"{name}.product")
        return graph.node("Add", (product, self.weight(f"{name}.bias")), name)

    def layer_norm(self, value: str, name: str) -> str:
        """Layer norm over the last axis."""
        scale, bias = self.weight(f"{name}.scale"), self.weight(f"{name}.bias")
        return self.graph.node(
            "LayerNormalization", (value, scale, bias), name, axis=-1, epsilon=self.epsilon
        )

    def after_attention(self, name: str, attended: str, residual: str) -> str:
        """The rest of a layer.

        Args:
            name: `layer.N`.
            attended: What its attention gives, [..., H].
            residual: The layer's input at the same tokens, [..., H].
        """
        graph = self.graph
        projected = self.product(attended, f"{name}.projected")
        total = graph.node("Add", (projected, residual), f"{name}.attention.sum")
        middle = self.layer_norm(total, f"{name}.attention.norm")
        wide = self.product(middle, f"{name}.wide")
        active = graph.node(self.operator, (wide,), f"{name}.active", **self.attributes)
        narrow = self.product(active, f"{name}.narrow")
        total = graph.node("Add", (narrow, middle), f"{name}.sum")
        return self.layer_norm(total, f"{name}.norm")
