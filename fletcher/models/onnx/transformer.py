"""Padded graphs of transformers of any family, written layer by layer.

These graphs differ from exporters' graphs:

- They include pooling, dense layers and normalization.
- One table holds the sum of positions and token types.
- The query weights include the attention's scale.
- Most norms and activations are single operators, and attention has the form that engines fuse.
- Masks are computed once for all layers.
- Positions, distances, masks and counts are integers or booleans: engines may round every float to
  bfloat16, where 511 and 512 are one number. They become floats only where they are multiplied.
- With `cls` pooling, the last layer computes only the pooled token.

docs/lab-book.md compares this form with others for BERT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fletcher.models.bundle.bundle import HANDED_ON, HIDDEN
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.encoder import Dense, EncoderLayers, Tensors
from fletcher.models.onnx.graph import ONNX_BOOL, ONNX_FLOAT, GraphBuilder
from fletcher.models.onnx.pooling import write_pooling
from fletcher.models.onnx.positions import alibi_slopes, distance_buckets, yarn_frequencies

# Score of masked tokens. Its exp is 0 in float32, and float16 and bfloat16 can represent it.
MASKED_SCORE = -10_000.0
MIN_NORM = 1e-12  # as in torch.nn.functional.normalize


class TransformerWriter:
    """Writer of a model's padded graph: embeddings, layers, pooling and normalization."""

    def __init__(self, graph: GraphBuilder, architecture: Architecture, tensors: Tensors) -> None:
        self.graph = graph
        self.architecture = architecture
        self.encoder = EncoderLayers(graph, tensors, architecture)
        width = architecture.head_width
        self.head_shape = graph.constant("shape.heads", [0, 0, architecture.num_heads, width])
        self.kv_shape = self.head_shape
        if architecture.kv_heads != architecture.num_heads:
            self.kv_shape = graph.constant("shape.kv", [0, 0, architecture.kv_heads, width])
        self.flat_shape = graph.constant("shape.flat", [0, 0, architecture.num_heads * width])
        self.first = graph.constant("index.first", [0])
        self.second = graph.constant("index.second", [1])
        self._made: dict[str, str] = {}

    def write(self, pooling: str, dense: Sequence[Dense], *, normalize: bool, layers: range) -> str:
        """Write the complete model, or one block of the model, which ends at an exit.

        The inputs are `input_ids` and `attention_mask`, int64 [B, L], where rows are padded at
        their ends. The outputs are `embedding`, float32 [B, dim], and, if the model normalizes,
        `norm`, float32 [B, 1]. The output `handed_on` of a block, float32 [B, L, H], is the input
        `hidden` of the next block, which has `hidden` instead of `input_ids`.

        Args:
            pooling: Pooling of token embeddings at each exit.
            dense: Linear layers after pooling.
            normalize: Divide embeddings by their norm, and add the output `norm`.
            layers: Indexes of the block's layers, counted from 0.

        Returns:
            Name of the token embeddings before pooling, [B, L, H], or [B, 1, H] for `cls`.
        """
        graph, architecture = self.graph, self.architecture
        states = ("batch", "length", architecture.hidden)
        if layers.start:
            mask = self.mask()
            hidden = graph.input(HIDDEN, np.float32, states)
        else:
            input_ids = graph.input("input_ids", np.int64, ("batch", "length"))
            mask = self.mask()
            hidden = self.embeddings(input_ids)
        only_first = False
        for index in layers:
            only_first = pooling == "cls" and index == architecture.num_layers - 1
            hidden = self.layer(index, hidden, mask, only_first=only_first)
        if layers.stop < architecture.num_layers:
            graph.node("Identity", (hidden,), HANDED_ON)
            graph.output(HANDED_ON, np.float32, states)
        if pooling == "cls" and not only_first:
            hidden = self._first(hidden, "exit.first", 1)
        if architecture.norm_first:
            hidden = self.encoder.norm(hidden, "final.norm")
        self.head(hidden, mask, pooling, dense, normalize=normalize)
        return hidden

    def mask(self) -> str:
        """Declare the input `attention_mask`, int64 [B, L]: 1 for tokens, 0 for padding."""
        mask = self.graph.input("attention_mask", np.int64, ("batch", "length"))
        self.graph.node("Shape", (mask,), "input.length", start=1, end=2)
        return mask

    def embeddings(self, input_ids: str) -> str:
        """Input of the first layer, float32 [B, L, H]."""
        graph, architecture = self.graph, self.architecture
        words = self.encoder.weight("embeddings.words")
        total = graph.node("Gather", (words, input_ids), "embeddings.word", axis=0)
        if architecture.learned_positions:
            position = self._cut("embeddings.position", self.encoder.weight("embeddings.positions"))
            total = graph.node("Add", (total, position), "embeddings.sum")
        elif architecture.type_vocab_size:
            kind = self.encoder.weight("embeddings.types")
            total = graph.node("Add", (total, kind), "embeddings.sum")
        return self.encoder.norm(total, "embeddings.norm") if architecture.embedding_norm else total

    def layer(self, index: int, hidden: str, mask: str, *, only_first: bool = False) -> str:
        """Write one layer; its input and output are [B, L, H].

        With `only_first`, the output has only each row's first token, [B, 1, H].
        """
        name, architecture = f"layer.{index}", self.architecture
        entering = hidden
        if architecture.norm_first and (index or architecture.norm_of_first):
            entering = self.encoder.norm(hidden, f"{name}.attention.norm")
        attended = self._attention(index, entering, mask, only_first=only_first)
        if only_first:
            hidden = self._first(hidden, f"{name}.first", 1)
        return self.encoder.after_attention(name, attended, hidden)

    def head(
        self, hidden: str, mask: str, pooling: str, dense: Sequence[Dense], *, normalize: bool
    ) -> None:
        """Write the graph's end, from token embeddings to the graph's outputs.

        `hidden` is [B, L, H], or [B, 1, H] for `cls`. `mask` is the value that the method `mask`
        returns. The other parameters are as in `write`.
        """
        graph = self.graph
        usual = {"cls": self._cls, "mean": self._mean, "last_token": self._last}
        if pooling in usual:
            value = usual[pooling](hidden, mask)
        else:
            value = write_pooling(self.encoder, pooling, hidden, mask)
        width = self.architecture.hidden * (1 + pooling.count("+"))
        value, width = self.encoder.denses(value, dense, width)
        if not normalize:
            graph.node("Identity", (value,), "embedding")
            graph.output("embedding", np.float32, ("batch", width))
            return
        graph.node("ReduceL2", (value, self.second), "norm", keepdims=1)
        least = self.encoder.scalar("norm.least", MIN_NORM)
        graph.node("Max", ("norm", least), "norm.bounded")
        graph.node("Div", (value, "norm.bounded"), "embedding")
        graph.output("embedding", np.float32, ("batch", width))
        graph.output("norm", np.float32, ("batch", 1))

    def _attention(self, index: int, hidden: str, mask: str, *, only_first: bool) -> str:
        """Output of self-attention, [B, L, heads x width]; [B, 1, ...] with `only_first`."""
        graph, name = self.graph, f"layer.{index}"
        asking = self._first(hidden, f"{name}.asking", 1) if only_first else hidden
        # With `only_first`, queries have position 0, and a rotation by position 0 changes nothing.
        rotation = self._rotation(index)
        queries = self._heads(asking, f"{name}.q", () if only_first else rotation)
        keys = self._heads(hidden, f"{name}.k", rotation)
        values = self._heads(hidden, f"{name}.v", ())
        # Engines turn this second transpose into a flag of the product.
        keys = graph.node("Transpose", (keys,), f"{name}.k.columns", perm=(0, 1, 3, 2))
        scores = graph.node("MatMul", (queries, keys), f"{name}.scores")
        for number, term in enumerate(self._terms(index, mask, only_first=only_first)):
            scores = graph.node("Add", (scores, term), f"{name}.scores.{number}")
        shares = graph.node("Softmax", (scores,), f"{name}.shares", axis=-1)
        mixed = graph.node("MatMul", (shares, values), f"{name}.mixed")
        rows = graph.node("Transpose", (mixed,), f"{name}.mixed.rows", perm=(0, 2, 1, 3))
        return graph.node("Reshape", (rows, self.flat_shape), f"{name}.attended")

    def _heads(self, value: str, name: str, rotation: Sequence[str]) -> str:
        """Queries, keys or values after norm and rotation, [B, heads, L, width]."""
        graph, architecture = self.graph, self.architecture
        part = name[-1]
        shape = self.head_shape if part == "q" else self.kv_shape
        value = graph.node("Reshape", (self.encoder.product(value, name), shape), f"{name}.split")
        if architecture.head_norm and part != "v":
            value = self.encoder.rms_norm(value, f"{name}.norm")
        if rotation:
            value = self._rotated(value, name, *rotation)
        if part != "q":
            value = self._repeated(value)
        return graph.node("Transpose", (value,), f"{name}.heads", perm=(0, 2, 1, 3))

    def _rotated(self, value: str, name: str, cosines: str, sines: str) -> str:
        graph = self.graph
        halves = graph.nodes(
            "Split", (value,), (f"{name}.left", f"{name}.right"), axis=-1, num_outputs=2
        )
        swapped = graph.node("Concat", (halves[1], halves[0]), f"{name}.swapped", axis=-1)
        straight = graph.node("Mul", (value, cosines), f"{name}.straight")
        across = graph.node("Mul", (swapped, sines), f"{name}.across")
        return graph.node("Add", (straight, across), f"{name}.rotated")

    def _repeated(self, value: str) -> str:
        """Key or value heads, each repeated for all query heads that share the head."""
        graph, architecture = self.graph, self.architecture
        kv_heads, width = architecture.kv_heads, architecture.head_width
        if kv_heads == architecture.num_heads:
            return value
        group = architecture.num_heads // kv_heads
        apart = self._once(
            "shape.apart", lambda name: graph.constant(name, [0, 0, kv_heads, 1, width])
        )
        copies = self._once("shape.copies", lambda name: graph.constant(name, [1, 1, 1, group, 1]))
        alone = graph.node("Reshape", (value, apart), f"{value}.alone")
        many = graph.node("Expand", (alone, copies), f"{value}.many")
        return graph.node("Reshape", (many, self.head_shape), f"{value}.repeated")

    def _rotation(self, index: int) -> Sequence[str]:
        """Cosines and sines of a layer's rotary positions, [L, 1, width].

        The two halves of a head, a and b, are rotated against each other: (a, b) becomes
        (a cos - b sin, b cos + a sin). So the first half of the sines is negative.
        """
        architecture = self.architecture
        if not architecture.rotary:
            return ()
        theta = architecture.rotary[index]
        width = architecture.head_width
        name = f"rotary.{theta:g}"
        if name not in self._made:
            # Computed in float32, as in PyTorch, so that late positions have the same angles.
            powers = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
            frequencies = np.float32(1) / np.float32(theta) ** powers
            scale = np.float32(1)
            if architecture.yarn:
                frequencies, scale = yarn_frequencies(frequencies, theta, architecture.yarn)
            positions = np.arange(architecture.max_length, dtype=np.float32)
            angles = (positions[:, None] * frequencies)[:, None, :]
            cosines, sines = np.cos(angles) * scale, np.sin(angles) * scale
            for part, halves in (("cos", (cosines, cosines)), ("sin", (-sines, sines))):
                table = self.graph.constant(f"{name}.{part}.all", np.concatenate(halves, axis=-1))
                self._cut(f"{name}.{part}", table)
            self._made[name] = name
        return f"{name}.cos", f"{name}.sin"

    def _terms(self, index: int, mask: str, *, only_first: bool) -> list[str]:
        """Terms that are added to a layer's scores; layers share equal terms.

        A causal model needs no mask of padding: padding follows a row's tokens, and tokens do not
        attend to later places.
        """
        architecture = self.architecture
        window = architecture.windows[index] if architecture.windows else 0
        terms = []
        if architecture.distance_bias:
            terms.append(self._once(f"bias.{architecture.distance_bias}", self._distance_bias))
        if architecture.causal or window:
            reach = "before" if architecture.causal else "around"
            name = f"seen.{reach}.{window}"
            terms.append(self._once(name, lambda name: self._seen(name, window)))
        if only_first:
            terms = [self._first(term, f"{term}.first", -2) for term in terms]
        if not architecture.causal:
            padding = self._once("padding", lambda name: self._padding(mask, name))
            if window:
                name = f"{terms[-1]}.padding"
                both = (terms.pop(), padding)
                padding = self._once(name, lambda name: self.graph.node("Add", both, name))
            terms.append(padding)
        return terms

    def padding_scores(self, mask: str) -> str:
        """float32 [B, L], 0 for tokens and MASKED_SCORE for padding."""

        def write(name: str) -> str:
            is_token = self.graph.node("Cast", (mask,), "padding.not", to=ONNX_BOOL)
            scores = (self.encoder.scalar("zero", 0), self.encoder.scalar("masked", MASKED_SCORE))
            return self.graph.node("Where", (is_token, *scores), name)

        return self._once("padding.scores", write)

    def _padding(self, mask: str, name: str) -> str:
        """float32 [B, 1, 1, L], 0 for tokens and MASKED_SCORE for padding."""
        axes = self.graph.constant("axes.heads", [1, 2])
        return self.graph.node("Unsqueeze", (self.padding_scores(mask), axes), name)

    def _seen(self, name: str, window: int) -> str:
        """float32 [L, L], 0 if token `row` attends to token `column`, else MASKED_SCORE."""
        graph = self.graph
        distance = self._once("distance", self._distance)
        unseen = []
        if self.architecture.causal:
            unseen.append(graph.node("Greater", (distance, self.first), f"{name}.later"))
        if window:
            reach = graph.constant(f"{name}.reach", [window])
            away = graph.node("Abs", (distance,), f"{name}.away")
            unseen.append(graph.node("Greater", (away, reach), f"{name}.far"))
        either = graph.node("Or", unseen, f"{name}.not") if len(unseen) > 1 else unseen[0]
        masked = self.encoder.scalar("masked", MASKED_SCORE)
        return graph.node("Where", (either, masked, self.encoder.scalar("zero", 0)), name)

    def _distance(self, name: str) -> str:
        """int64 [L, L], the column's index minus the row's index."""
        graph = self.graph
        every = np.arange(self.architecture.max_length)
        places = self._cut(f"{name}.places", graph.constant(f"{name}.places.all", every))
        rows = graph.node("Unsqueeze", (places, self.second), f"{name}.rows")
        return graph.node("Sub", (places, rows), name)

    def _distance_bias(self, name: str) -> str:
        """Bias of scores by the distance of two tokens, float32 [heads, L, L]."""
        graph, architecture = self.graph, self.architecture
        distance = self._once("distance", self._distance)
        if architecture.distance_bias == "alibi":
            slopes = graph.constant(f"{name}.slopes", alibi_slopes(architecture.num_heads))
            away = graph.node("Abs", (distance,), f"{name}.away")
            away = graph.node("Cast", (away,), f"{name}.away.float", to=ONNX_FLOAT)
            return graph.node("Mul", (away, slopes), name)
        farthest = architecture.max_length - 1
        buckets = distance_buckets(np.arange(-farthest, farthest + 1))
        table = np.ascontiguousarray(self.encoder.tensors.read_tensor("distances").T[:, buckets])
        shift = graph.constant(f"{name}.shift", [farthest])
        index = graph.node("Add", (distance, shift), f"{name}.index")
        return graph.node("Gather", (graph.constant("distances", table), index), name, axis=1)

    def _cut(self, name: str, table: str) -> str:
        """First L rows of a table, where L is the padded length of the batch."""
        return self.graph.node("Slice", (table, self.first, "input.length", self.first), name)

    def _first(self, value: str, name: str, axis: int) -> str:
        axes = self._once(f"axis.{axis}", lambda name: self.graph.constant(name, [axis]))
        return self.graph.node("Slice", (value, self.first, self.second, axes), name)

    def _cls(self, hidden: str, _mask: str) -> str:
        return self.graph.node("Squeeze", (hidden, self.second), "pooled")

    def _mean(self, hidden: str, mask: str) -> str:
        """Mean over each row's tokens, computed as a matrix product with the mask."""
        graph = self.graph
        row = graph.node("Cast", (mask,), "mask.float", to=ONNX_FLOAT)
        row = graph.node("Unsqueeze", (row, self.second), "mask.row")
        total = graph.node("MatMul", (row, hidden), "tokens.sum")
        total = graph.node("Squeeze", (total, self.second), "tokens.sum.flat")
        count = graph.node("ReduceSum", (mask, self.second), "tokens.count", keepdims=1)
        count = graph.node("Cast", (count,), "tokens.count.float", to=ONNX_FLOAT)
        return graph.node("Div", (total, count), "pooled")

    def _last(self, hidden: str, mask: str) -> str:
        graph = self.graph
        count = graph.node("ReduceSum", (mask, self.second), "tokens.count", keepdims=1)
        index = graph.node("Sub", (count, self.second), "last.index")
        return graph.node("GatherND", (hidden, index), "pooled", batch_dims=1)

    def _once(self, name: str, make: Callable[[str], str]) -> str:
        """Return the value called `name`, which `make` writes at the first call."""
        if name not in self._made:
            self._made[name] = make(name)
        return self._made[name]
