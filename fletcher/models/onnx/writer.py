"""Conversion of checkpoints of any supported family to graphs, without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import LATE_GRAPH, block_file
from fletcher.models.bundle.files import invalid_value
from fletcher.models.bundle.spec import ModelSpec
from fletcher.models.checkpoint.checkpoint import Checkpoint
from fletcher.models.checkpoint.markers import Queries, Skipped
from fletcher.models.checkpoint.modules import DenseModule
from fletcher.models.checkpoint.weights import Weights
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.encoder import Dense, Tensors
from fletcher.models.onnx.families import family_of
from fletcher.models.onnx.graph import GRAPH_FILE, GraphBuilder
from fletcher.models.onnx.heads import MaskedHead, SparseWriter, TokenWriter, write_late
from fletcher.models.onnx.transformer import TransformerWriter


def write_model(
    checkpoint: Checkpoint, folder: Path, *, source: str, exits: Sequence[int] = ()
) -> ModelSpec:
    """Write a checkpoint's graph and weights into `folder`, one block for each exit.

    A dense model with mean pooling and without exits gets a second graph, for late chunking.

    The graph's inputs are `input_ids` and `attention_mask`, int64 [B, L]. The outputs of a dense
    model are `embedding`, float32 [B, dim], and, if the model normalizes, `norm`, float32 [B, 1].

    `exits` lists layers after which the model can return vectors. The model's last layer is always
    added to them.

    Raises:
        ModelError: `exits` has a layer that the model lacks, or is given for a model that is not
            dense. Or the checkpoint's family is not in `families`. Or the checkpoint computes
            something that the graphs of its family do not.
    """
    kind = checkpoint.kind
    family = family_of(checkpoint.config)
    architecture = family.architecture(checkpoint.config)
    if architecture.pad_token_id >= architecture.vocab_size:
        expected = f"a row of the table of embeddings, which has {architecture.vocab_size}"
        value = architecture.pad_token_id
        raise invalid_value("config.json", "pad_token_id", value, expected)
    weights = Weights(checkpoint.folder, family.prefixes)
    tensors = family.tensors(weights, architecture)
    dense_weights = [Weights(module.folder, ()) for module in checkpoint.dense]
    dense = [_dense(*one) for one in zip(checkpoint.dense, dense_weights, strict=True)]
    layers = _exits(exits, architecture.num_layers, kind.output)
    files = [block_file(one) for one in layers] if len(layers) > 1 else [GRAPH_FILE]
    for file, first, last in zip(files, (0, *layers), layers, strict=False):
        with GraphBuilder(folder, family.name, file) as graph:
            hidden = _writer(kind.output, graph, architecture, tensors, weights).write(
                checkpoint.pooling, dense, normalize=checkpoint.normalize, layers=range(first, last)
            )
            graph.save()
            if kind.output == "dense" and checkpoint.pooling == "mean" and len(layers) == 1:
                late = graph.fork(LATE_GRAPH, hidden)
                write_late(late, architecture, tensors, hidden, dense)
                late.save()
    tensors.check_all_read(kind.output, architecture.num_layers)
    identity = architecture.identity()
    if dense:
        identity["dense"] = [
            one.digest({"activation": module.activation})
            for one, module in zip(dense_weights, checkpoint.dense, strict=True)
        ]
    has_norms = checkpoint.normalize and kind.output == "dense"
    skipped = kind.skipped or Skipped(0, ())
    queries = kind.queries or Queries(0, 0)
    max_length = min(checkpoint.max_length, architecture.max_length)
    return ModelSpec(
        family=family.name,
        dim=checkpoint.dims[-1],
        max_length=max_length,
        pooling=checkpoint.pooling,
        normalize=checkpoint.normalize,
        num_layers=architecture.num_layers,
        layers=layers,
        dims=checkpoint.dims,
        default_dims=checkpoint.default_dims,
        prompts=checkpoint.prompts,
        default_prompt=checkpoint.default_prompt,
        similarity=checkpoint.similarity,
        pad_token_id=architecture.pad_token_id,
        graph_file=files[-1],
        graph_output="embedding",
        inputs=("input_ids", "attention_mask"),
        outputs=("embedding", "norm") if has_norms else ("embedding",),
        licence=checkpoint.licence,
        source=source,
        weights_sha256=weights.digest(identity),
        output=kind.output,
        skip_marker=skipped.marker,
        skip_tokens=skipped.tokens,
        query_marker=queries.marker,
        query_length=min(queries.length, max_length),
        query_filler=-1 if queries.filler is None else queries.filler,
        fillers_attended=queries.attended,
    )


def _writer(
    output: str, graph: GraphBuilder, architecture: Architecture, tensors: Tensors, weights: Weights
) -> TransformerWriter:
    if output == "sparse":
        words = tensors.read_tensor("embeddings.words")
        head = MaskedHead.from_weights(weights, architecture, words)
        return SparseWriter(graph, architecture, tensors, head)
    return (TokenWriter if output == "multi" else TransformerWriter)(graph, architecture, tensors)


def _exits(asked: Sequence[int], num_layers: int, output: str) -> tuple[int, ...]:
    if asked and output != "dense":
        raise ModelError(
            f"`exits` is given, but the model gives {output} vectors, which only its last layer "
            "makes; leave it out",
            field="exits",
        )
    for one in asked:
        if not 1 <= one <= num_layers:
            raise ModelError(
                f"`exits` has {one}, expected layers from 1 to {num_layers}, the model's last",
                field="exits",
                allowed=[str(layer) for layer in range(1, num_layers + 1)],
            )
    return tuple(sorted({*asked, num_layers}))


def _dense(module: DenseModule, weights: Weights) -> Dense:
    weight = np.asarray(weights.read_tensor("linear.weight", module.shape).T)
    bias = weights.read_tensor("linear.bias", module.shape[:1]) if module.bias else None
    return Dense(weight, bias, module.activation)
