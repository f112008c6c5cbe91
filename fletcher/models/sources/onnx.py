"""Models from exported ONNX files; the graph of such a file is not changed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import TOKENIZER
from fletcher.models.bundle.files import is_inside, sha256
from fletcher.models.bundle.spec import GRAPH_INPUTS, MANIFEST, GraphInput, GraphOutput, ModelSpec
from fletcher.models.checkpoint.checkpoint import Checkpoint
from fletcher.models.onnx.graph import read_model
from fletcher.models.onnx.onnx_pb2 import (
    GraphProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    ValueInfoProto,
)
from fletcher.models.sources.folder import Progress

# Usual names of outputs with embeddings, the preferred name first. An output with another name may
# be anything, such as a classifier's scores, so it is taken only if the user names it.
_KNOWN_OUTPUTS = ("embedding", "sentence_embedding", "token_embeddings", "last_hidden_state")


@dataclass(frozen=True, slots=True)
class _Value:
    """Input or output of a graph; None in `shape` is a size known only at run time."""

    name: str
    element_type: int
    shape: tuple[int | None, ...]


def build_from_onnx(
    file: Path,
    tokenizer: Path | None,
    output_name: str | None,
    staging: Path,
    exits: Sequence[int],
    progress: Progress,
) -> ModelSpec:
    """Copy an ONNX file, its external data and its tokenizer into `staging`.

    Length, pooling and prompts are read from the checkpoint's config.json and related files. These
    must be in the ONNX file's folder or in the folder above, as in repositories on the hub.

    `output_name` is the name of the graph's output with the embeddings; None takes one of the usual
    names.

    Raises:
        ModelError: `exits` is not empty. Or the file is not a complete ONNX model, has inputs or
            outputs that a text model does not have, or has external data outside of its folder.
    """
    if exits:
        raise ModelError(
            "`exits` is given, but the graph of an .onnx file is not changed; add the model's "
            "checkpoint instead",
            field="exits",
        )
    checkpoint = Checkpoint.from_folder(_checkpoint_folder(file), tokenizer=tokenizer)
    if checkpoint.kind.output != "dense":
        raise ModelError(
            f"the checkpoint beside {file.name} gives {checkpoint.kind.output} vectors, which "
            "Fletcher makes with its own graphs alone; add the checkpoint's folder"
        )
    progress(f"copying {file.name}")
    inputs, output, locations = _inspect(file, output_name)
    dim = output.shape[-1]
    pooled = len(output.shape) == 2
    if dim is None:
        dim = checkpoint.dims[-1]
    elif not pooled and dim != checkpoint.dims[-1]:
        raise ModelError(
            f"{file.name}: output `{output.name}` is {dim} wide, config.json says `hidden_size` "
            f"{checkpoint.dims[-1]}"
        )
    if checkpoint.dense and not pooled:
        raise ModelError(
            f"{file.name} ends at token embeddings, but modules.json lists Dense after pooling; "
            "export the whole model, or add the checkpoint's folder"
        )
    graph_output: GraphOutput = "embedding" if pooled else "token_embeddings"
    digests = {"graph": sha256(file)}
    shutil.copyfile(file, staging / file.name)
    for location in locations:
        (staging / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.parent / location, staging / location)
        digests[location] = sha256(staging / location)
    checkpoint.tokenizer.write(staging / TOKENIZER)
    digest = hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
    num_layers = checkpoint.config.get("num_hidden_layers")
    layers = num_layers if isinstance(num_layers, int) and num_layers > 0 else 0
    return ModelSpec(
        family="onnx",
        dim=dim,
        max_length=checkpoint.max_length,
        pooling=checkpoint.pooling,
        normalize=checkpoint.normalize,
        num_layers=layers,
        layers=(layers,),
        dims=(*(one for one in checkpoint.dims[:-1] if one < dim), dim),
        default_dims=checkpoint.default_dims if checkpoint.default_dims < dim else 0,
        prompts=checkpoint.prompts,
        default_prompt=checkpoint.default_prompt,
        similarity=checkpoint.similarity,
        pad_token_id=int(checkpoint.config.get("pad_token_id") or 0),
        graph_file=file.name,
        graph_output=graph_output,
        inputs=inputs,
        outputs=(output.name,),
        licence=checkpoint.licence,
        source=f"onnx:{file.name}",
        weights_sha256=digest,
    )


def _checkpoint_folder(file: Path) -> Path:
    for folder in (file.parent, file.parent.parent):
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(
        f"{file.name} comes without config.json, which has its length and pooling: put the "
        "checkpoint's config.json (and modules.json and 1_Pooling, if it has them) beside it or in "
        "the folder above"
    )


def _inspect(
    file: Path, output_name: str | None
) -> tuple[tuple[GraphInput, ...], _Value, list[str]]:
    """Read three things from a graph: input names, the output to use, and locations.

    The locations are the relative paths of the files with external data.
    """
    try:
        model = read_model(file)
        tensors = list(_tensors(model.graph))
        for function in model.functions:
            tensors += _tensors_of_nodes(function.node)
        stored = {tensor.name for tensor in model.graph.initializer}
        inputs = [_value(one) for one in model.graph.input]
        outputs = [_value(one) for one in model.graph.output]
        locations = sorted(_locations(file, tensors))
    except ValueError as error:
        raise ModelError(
            f"{file.name} is no complete ONNX model ({error}); get or export it again"
        ) from None
    names = _check_inputs(file, [one for one in inputs if one.name not in stored])
    return names, _choose_output(file, outputs, output_name), locations


def _check_inputs(file: Path, inputs: list[_Value]) -> tuple[GraphInput, ...]:
    names = [one.name for one in inputs]
    if "input_ids" not in names or not set(names) <= set(GRAPH_INPUTS):
        raise ModelError(
            f"{file.name} has the inputs {', '.join(names) or 'none'}: expected `input_ids` and "
            f"at most {', '.join(GRAPH_INPUTS[1:])}",
            allowed=GRAPH_INPUTS,
        )
    for one in inputs:
        if one.element_type != TensorProto.INT64 or len(one.shape) not in (0, 2):
            raise ModelError(f"{file.name}: input `{one.name}` is not int64 [batch, length]")
        if any(size is not None for size in one.shape):
            raise ModelError(
                f"{file.name}: input `{one.name}` has the fixed shape {list(one.shape)}; export "
                "it with dynamic batch and length"
            )
    return cast("tuple[GraphInput, ...]", tuple(names))


def _choose_output(file: Path, outputs: list[_Value], wanted: str | None) -> _Value:
    usable = [
        one for one in outputs if one.element_type == TensorProto.FLOAT and len(one.shape) in (2, 3)
    ]
    if not usable:
        raise ModelError(
            f"{file.name} has no output that is float32 [batch, dim] or [batch, length, dim]; "
            "export it with one"
        )
    names = [one.name for one in usable]
    known = [name for name in ([wanted] if wanted else _KNOWN_OUTPUTS) if name in names]
    if not known:
        asked = f"none called {wanted!r}" if wanted else f"none of {', '.join(_KNOWN_OUTPUTS)}"
        raise ModelError(
            f"{file.name} has the outputs {', '.join(names)[:500]}, and {asked}; if one of them "
            "has embeddings, name it with --output",
            field="output",
            allowed=names,
        )
    return next(one for one in usable if one.name == known[0])


def _value(info: ValueInfoProto) -> _Value:
    tensor = info.type.tensor_type
    shape = tuple(
        one.dim_value if one.HasField("dim_value") and one.dim_value else None
        for one in tensor.shape.dim
    )
    return _Value(info.name, tensor.elem_type, shape)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All tensors of a graph and of the graphs nested in the graph's nodes."""
    yield from graph.initializer
    yield from _of_sparse(graph.sparse_initializer)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for one in node.attribute:
            yield from (one.t, *one.tensors)
            yield from _of_sparse([one.sparse_tensor, *one.sparse_tensors])
            for graph in (one.g, *one.graphs):
                yield from _tensors(graph)


def _of_sparse(tensors: Iterable[SparseTensorProto]) -> Iterator[TensorProto]:
    for one in tensors:
        yield from (one.values, one.indices)


def _locations(file: Path, tensors: Iterable[TensorProto]) -> set[str]:
    """Files of external tensors, after a check of their place and size.

    Each file must be in the folder of the ONNX file and long enough for its tensors.
    """
    locations = set()
    for tensor in tensors:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        location = place.get("location", "")
        path = file.parent / location
        inside = is_inside(location) and path.resolve().is_relative_to(file.parent.resolve())
        if not inside or location in (MANIFEST, TOKENIZER, file.name):
            raise ModelError(
                f"{file.name} has external data at {location[:200]!r}, expected a separate file "
                "inside the model's folder"
            )
        if not path.is_file():
            raise ModelError(f"{location}, the file of {file.name}'s weights, is missing")
        try:
            end = int(place.get("offset", "0")) + int(place.get("length", "0"))
        except ValueError:
            raise ValueError(f"tensor {tensor.name} has an invalid offset or length") from None
        if end > path.stat().st_size:
            raise ModelError(f"{location} is cut off: {file.name} needs {end:,} bytes of it")
        locations.add(location)
    return locations
