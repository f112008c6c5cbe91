"""Floating-point operations of a forward pass, from a bundle's description.

A product of [n, k] and [k, m] counts 2nkm. Only matrix products count: norms, softmax and
activations are a few percent, and no processor does them at its rate of products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.jobs import JobError
from fletcher.models.bundle.bundle import ModelBundle

FAMILIES = ("bert",)


@dataclass(frozen=True)
class Architecture:
    """The sizes of an encoder that determine its products.

    Attributes:
        hidden: Width of a token's state.
        intermediate: Width inside the feed-forward part.
        num_layers: Number of layers.
        last_first_only: The last layer computes only the first token, and keys and values.
    """

    hidden: int
    intermediate: int
    num_layers: int
    last_first_only: bool

    @classmethod
    def of(cls, bundle: ModelBundle) -> Architecture:
        """Architecture of a bundle whose graph Fletcher wrote.

        Raises:
            JobError: Another graph, or the `onnx` package is missing.
        """
        if bundle.family not in FAMILIES:
            raise JobError(
                f"`--model` {bundle.name} is of family {bundle.family!r}; operations are counted "
                f"for {', '.join(FAMILIES)}, whose graphs Fletcher writes"
            )
        try:
            import onnx
        except ImportError:
            raise JobError("the graph is read with `onnx`: pip install '.[bench]'") from None
        graph = onnx.load(str(bundle.graph), load_external_data=False).graph
        weights = {one.name: tuple(one.dims) for one in graph.initializer}
        products = [
            weights.get(node.input[1], ()) for node in graph.node if node.op_type == "MatMul"
        ]
        # Back to the hidden width come the attention's output and the feed-forward part, which is
        # wider: fletcher.json has no field for how wide.
        inner = [shape[0] for shape in products if shape[1:] == (bundle.dim,)]
        return cls(bundle.dim, max(inner), bundle.num_layers, bundle.pooling == "cls")

    def shapes(self) -> list[tuple[int, int]]:
        """A layer's weights [rows, columns]: queries, keys and values; output; inner; back."""
        width, inner = self.hidden, self.intermediate
        return [(width, 3 * width), (width, width), (width, inner), (inner, width)]

    def forward(self, lengths: npt.NDArray[np.integer]) -> float:
        """Operations for texts of these lengths (tokens), all layers, attention included."""
        tokens = lengths.astype(np.float64)
        dense = 2 * sum(rows * columns for rows, columns in self.shapes())
        layers = np.full(len(tokens), self.num_layers, np.float64)
        total = np.zeros(len(tokens))
        if self.last_first_only:
            layers -= 1
            both = 2 * 2 * self.hidden**2  # keys and values, of every token
            total += both * tokens + (dense - both) + 4 * self.hidden * tokens
        total += layers * (dense * tokens + 4 * self.hidden * tokens**2)
        return float(total.sum())
