"""Graphs of BERT without padding, for GPUs: a run's texts form one sequence.

Every product is over T tokens, the sum of all texts' lengths, and nothing is computed for padding.
Only attention needs to know where a text begins and ends. Attention is ONNX Runtime's operator
PackedMultiHeadAttention with separate queries, keys and values, because this form uses
FlashAttention at every length. ONNX Runtime has this operator only on CUDA. The *twin* of a graph
has standard operators instead, so that it can run on a CPU and be compared with other graphs there.

Layer norm and the addition before it are separate operators, because of their precision. ONNX
Runtime's CUDA kernel for LayerNormalization sums float16 values in float32. The kernel for the
fused SkipLayerNormalization sums them in float16 (contrib_ops/cuda/bert/skip_layer_norm_impl.cu).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.onnx.architecture import Style
from fletcher.models.onnx.encoder import Array, EncoderLayers
from fletcher.models.onnx.graph import (
    GRAPH_FILE,
    MICROSOFT,
    ONNX_FLOAT,
    ONNX_FLOAT16,
    ONNX_INT64,
    GraphBuilder,
)
from fletcher.models.onnx.transformer import MASKED_SCORE, MIN_NORM
from fletcher.models.onnx.written import WrittenBert

# Families that compute the same as BERT; their checkpoints may have other tensor names.
FAMILIES = ("bert", "distilbert", "roberta")


def can_pack(bundle: ModelBundle) -> bool:
    """Whether a graph without padding can be written for a model's family and output."""
    poolings = ("mean", "cls", "last_token")
    return bundle.family in FAMILIES and bundle.output == "dense" and bundle.pooling in poolings


INPUTS = ("input_ids", "position_ids", "token_offset", "cumulative_sequence_length")

Attention = Literal["packed", "standard"]
Precision = Literal["float16", "float32"]

_ONNX_TYPES = {"float32": ONNX_FLOAT, "float16": ONNX_FLOAT16}


def write_packed(
    bundle: ModelBundle,
    folder: Path,
    *,
    precision: Precision = "float16",
    attention: Attention = "packed",
    output: Precision = "float32",
) -> Path:
    """Write a bundle's graph without padding, and its weights, into `folder`.

    The graph's inputs are int32:

    - `input_ids` and `position_ids`, [T].
    - `token_offset`, [B, S]: the indexes of the T tokens in the padded and flattened batch [B, S],
      followed by the indexes of the padding.
    - `cumulative_sequence_length`, [B + 1]: the index of each text's first token, followed by T.

    The outputs are `embedding`, [B, dim], and, if the model normalizes, `norm`, float32 [B, 1].

    Args:
        bundle: The model. Its family must be one of FAMILIES.
        folder: Folder for the files GRAPH_FILE and WEIGHTS_FILE.
        precision: Precision of weights and arithmetic. Sums in layer norms, pooling and
            normalization are always float32.
        attention: `packed` for CUDA, `standard` for the twin.
        output: Element type of the output `embedding`.

    Returns:
        Path of the graph.

    Raises:
        ModelError: The bundle is of another family, has exits or is damaged, or its weights exceed
            the range of float16.
    """
    if bundle.family not in FAMILIES:
        raise ModelError(
            f"`model` {bundle.name} is of family {bundle.family}; graphs without padding are "
            f"written for {', '.join(FAMILIES)}",
            field="model",
        )
    if bundle.has_exits:
        raise ModelError(
            f"`model` {bundle.name} has exits, which graphs without padding cannot have; add it "
            "again without --exits, or ask for precision float32",
            field="model",
        )
    written = WrittenBert(bundle.graph)
    with GraphBuilder(folder, "bert-packed") as graph:
        writer = _PackedWriter(graph, bundle, written, precision, attention)
        writer.write(output)
        graph.save()
    return folder / GRAPH_FILE


class _Rounded:
    """A written graph's tensors, rounded to the new graph's precision."""

    def __init__(self, written: WrittenBert, precision: Precision) -> None:
        self._written = written
        self._precision = precision

    def read_tensor(self, name: str) -> Array:
        tensor = self._written.read_tensor(name)
        with np.errstate(over="ignore"):
            rounded: npt.NDArray[np.floating] = tensor.astype(self._precision)
        if not np.isfinite(rounded).all():
            raise ModelError(
                f"`precision` is {self._precision}, too small for the weights of `{name}`; ask for "
                "float32",
                field="precision",
            )
        return rounded


class _PackedWriter:
    def __init__(
        self,
        graph: GraphBuilder,
        bundle: ModelBundle,
        written: WrittenBert,
        precision: Precision,
        attention: Attention,
    ) -> None:
        self.graph = graph
        self.bundle = bundle
        self.precision = precision
        self.num_heads = written.num_heads
        self.width = written.hidden
        self.dense = written.dense
        style = Style(epsilon=written.epsilon, activation=written.activation)
        self.encoder = EncoderLayers(graph, _Rounded(written, precision), style)
        self.attend = self._packed_attention if attention == "packed" else self._twin_attention
        self.first = graph.constant("axis.first", [0])
        self.second = graph.constant("axis.second", [1])
        self.last = graph.constant("axis.last", [-1])

    def write(self, output: Precision) -> None:
        graph, bundle = self.graph, self.bundle
        input_ids = graph.input("input_ids", np.int32, ("tokens",))
        positions = graph.input("position_ids", np.int32, ("tokens",))
        graph.input("token_offset", np.int32, ("batch", "longest"))
        graph.input("cumulative_sequence_length", np.int32, ("batch + 1",))
        first_to_last = ("cumulative_sequence_length", self.first, self.last, self.first)
        starts = graph.node("Slice", first_to_last, "starts")  # int32 [B], each text's first token
        hidden = self._embeddings(input_ids, positions)
        for index in range(bundle.num_layers):
            name = f"layer.{index}"
            parts = [self.encoder.product(hidden, f"{name}.{part}") for part in "qkv"]
            attended = self.attend(name, *parts)
            if bundle.pooling != "mean" and index == bundle.num_layers - 1:
                # After the last layer's attention, only the pooled token of each text is needed.
                token = starts if bundle.pooling == "cls" else self._last_tokens()
                attended = graph.node("Gather", (attended, token), f"{name}.attended.one")
                hidden = graph.node("Gather", (hidden, token), f"{name}.one")
            hidden = self.encoder.after_attention(name, attended, hidden)
        pool = self._mean if bundle.pooling == "mean" else self._float32
        pooled = pool(hidden, "pooled")
        pooled, _ = self.encoder.denses(pooled, self.dense, self.width)
        if bundle.normalize:
            # On CUDA, ReduceL2 would run in cuDNN. These operators have kernels in ONNX Runtime.
            squares = graph.node(
                "ReduceSumSquare", (pooled, self.second), "norm.square", keepdims=1
            )
            norm = graph.node("Sqrt", (squares,), "norm")
            least = graph.constant("norm.least", np.array([MIN_NORM], np.float32))
            bounded = graph.node("Max", (norm, least), "norm.bounded")
            pooled = graph.node("Div", (pooled, bounded), "embedding.float32")
        graph.node("Cast", (pooled,), "embedding", to=_ONNX_TYPES[output])
        graph.output("embedding", output, ("batch", bundle.dim))
        if bundle.normalize:
            graph.output("norm", np.float32, ("batch", 1))

    def _ends(self, prefix: str) -> str:
        """int32 [B], index of the token after each text's last token."""
        end = self.graph.constant(f"{prefix}.end", [np.iinfo(np.int64).max])
        second_to_end = ("cumulative_sequence_length", self.second, end, self.first)
        return self.graph.node("Slice", second_to_end, f"{prefix}.ends")

    def _last_tokens(self) -> str:
        """int32 [B], index of each text's last token."""
        ends = self._ends("text")
        one = self.graph.constant("text.one", np.array([1], np.int32))
        return self.graph.node("Sub", (ends, one), "text.last")

    def _embeddings(self, input_ids: str, positions: str) -> str:
        graph = self.graph
        tables = [self.encoder.weight(f"embeddings.{one}") for one in ("words", "positions")]
        word = graph.node("Gather", (tables[0], input_ids), "embeddings.word", axis=0)
        position = graph.node("Gather", (tables[1], positions), "embeddings.position", axis=0)
        total = graph.node("Add", (word, position), "embeddings.sum")
        return self.encoder.norm(total, "embeddings.norm")

    def _packed_attention(self, name: str, queries: str, keys: str, values: str) -> str:
        return self.graph.node(
            "PackedMultiHeadAttention",
            (queries, keys, values, "", "token_offset", "cumulative_sequence_length"),
            f"{name}.attended",
            domain=MICROSOFT,
            num_heads=self.num_heads,
            scale=1.0,  # the query weights include the scale
        )

    def _twin_attention(self, name: str, queries: str, keys: str, values: str) -> str:
        """Attention with standard operators: pad the tokens, then remove the padding."""
        graph = self.graph
        if name == "layer.0":
            self._twin_places()
        heads = []
        for value, order in ((queries, (0, 2, 1, 3)), (keys, (0, 2, 3, 1)), (values, (0, 2, 1, 3))):
            padded = graph.node("ScatterND", ("twin.zeros", "twin.places", value), f"{value}.flat")
            split = graph.node("Reshape", (padded, "twin.heads"), f"{value}.padded")
            heads.append(graph.node("Transpose", (split,), f"{value}.heads", perm=order))
        product = graph.node("MatMul", heads[:2], f"{name}.attended.scores")
        masked = graph.node("Add", (product, "twin.scores"), f"{name}.attended.masked")
        shares = graph.node("Softmax", (masked,), f"{name}.attended.shares", axis=-1)
        mixed = graph.node("MatMul", (shares, heads[2]), f"{name}.attended.mixed")
        rows = graph.node("Transpose", (mixed,), f"{name}.attended.rows", perm=(0, 2, 1, 3))
        flat = graph.node("Reshape", (rows, "twin.flat"), f"{name}.attended.flat")
        return graph.node("GatherND", (flat, "twin.places"), f"{name}.attended")

    def _twin_places(self) -> None:
        """Write the tokens' places in the padded batch [B, S], and a mask of its padding."""
        graph, width, heads = self.graph, self.width, self.num_heads
        graph.constant("twin.flat", [-1, width])
        zero = graph.constant("twin.zero", np.zeros(1, self.precision))
        tail = graph.constant("twin.tail", [heads, width // heads])
        columns = graph.constant("twin.width", [width])
        graph.node("Shape", ("token_offset",), "twin.shape")
        graph.node("Concat", ("twin.shape", tail), "twin.heads", axis=0)
        graph.node("ReduceProd", ("twin.shape",), "twin.size", keepdims=1)
        graph.node("Concat", ("twin.size", columns), "twin.zeros.shape", axis=0)
        graph.node("Expand", (zero, "twin.zeros.shape"), "twin.zeros")
        graph.node("Reshape", ("token_offset", self.last), "twin.offsets")
        graph.node("Shape", ("input_ids",), "twin.tokens")
        start = graph.constant("twin.start", [0])
        graph.node("Slice", ("twin.offsets", start, "twin.tokens"), "twin.offsets.tokens")
        graph.node("Unsqueeze", ("twin.offsets.tokens", self.second), "twin.offsets.column")
        graph.node("Cast", ("twin.offsets.column",), "twin.places", to=ONNX_INT64)
        minus = graph.constant("twin.masked", np.array([MASKED_SCORE], self.precision))
        none = graph.constant("twin.none", np.zeros(1, self.precision))
        lengths, slots = self._lengths("twin"), self._slots("twin")
        graph.node("Less", (slots, lengths), "twin.real")
        graph.node("Where", ("twin.real", none, minus), "twin.scores.rows")
        axes = graph.constant("twin.axes", [1, 2])
        graph.node("Unsqueeze", ("twin.scores.rows", axes), "twin.scores")

    def _lengths(self, prefix: str) -> str:
        """int32 [B, 1], number of tokens of each text."""
        graph = self.graph
        lengths = graph.node("Sub", (self._ends(prefix), "starts"), f"{prefix}.lengths")
        return graph.node("Unsqueeze", (lengths, self.second), f"{prefix}.lengths.column")

    def _slots(self, prefix: str) -> str:
        """int32 [S], the numbers from 0 to S - 1.

        S is the length of the longest text. The numbers are sliced from a constant. The operator
        Range would have to copy its limit from the device to the host.
        """
        graph = self.graph
        numbers = np.arange(self.bundle.max_length, dtype=np.int32)
        every = graph.constant(f"{prefix}.slots.all", numbers)
        longest = graph.node("Shape", ("token_offset",), f"{prefix}.longest", start=1, end=2)
        return graph.node("Slice", (every, self.first, longest, self.first), f"{prefix}.slots")

    def _mean(self, hidden: str, name: str) -> str:
        """float32 [B, H], mean over each text's tokens, computed as a product with a mask.

        The product needs padded tokens. There are two ways to sum without padding, and both have a
        fault: sums by scattering would add in another order at each run, and differences of running
        sums lose digits.
        """
        graph = self.graph
        lengths, slots = self._lengths("pool"), self._slots("pool")
        begin = graph.node("Unsqueeze", ("starts", self.second), "pool.starts")
        places = graph.node("Add", (begin, slots), "pool.places.all")
        # Places after the last token are set to the last token; the mask multiplies them by 0.
        one = graph.constant("pool.one", np.array([1], np.int32))
        total = graph.node("Slice", ("pool.ends", self.last, "pool.end", self.first), "pool.tokens")
        last = graph.node("Sub", (total, one), "pool.last")
        places = graph.node("Min", (places, last), "pool.places")
        padded = graph.node("Gather", (hidden, places), "pool.padded", axis=0)
        real = graph.node("Less", (slots, lengths), "pool.real")
        mask = graph.node("Cast", (real,), "pool.mask", to=_ONNX_TYPES["float32"])
        row = graph.node("Unsqueeze", (mask, self.second), "pool.mask.row")
        total = graph.node("MatMul", (row, self._float32(padded, "pool.padded")), "pool.sum")
        total = graph.node("Squeeze", (total, self.second), "pool.sum.flat")
        count = graph.node("Cast", (lengths,), "pool.count", to=_ONNX_TYPES["float32"])
        return graph.node("Div", (total, count), name)

    def _float32(self, value: str, name: str) -> str:
        return self.graph.node("Cast", (value,), f"{name}.float32", to=_ONNX_TYPES["float32"])
