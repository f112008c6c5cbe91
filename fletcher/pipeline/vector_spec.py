"""Vector specs: which vectors of a model a command asks for."""

from __future__ import annotations

from dataclasses import replace

from fletcher.config.model import OutputConfig
from fletcher.core.chunking import Chunking
from fletcher.core.command import EmbedCommand
from fletcher.core.quantization import Ranges
from fletcher.core.schema import DTYPES, VectorSpec
from fletcher.errors import DimensionMismatchError, InvalidCommandError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.calibration import Cut
from fletcher.pipeline.prompts import resolve_prompt

# The pooling that the output schema names for sparse and multi-vector output.
_POOLINGS = {"sparse": "max", "multi": "none"}


def vector_spec(
    model: ModelBundle, options: EmbedCommand, dtypes: tuple[str, ...], rules: OutputConfig
) -> VectorSpec:
    """Returns the spec of the vectors that a command asks of a model.

    Args:
        options: The command.
        dtypes: Element types that the destination takes.
        rules: The server's rules for `dims` and `int8`.

    Raises:
        DimensionMismatchError: The model does not give vectors with `dims` dimensions.
        InvalidCommandError: The model, the server or the destination does not support the `layers`,
            `dtype`, `output` or `prompt` of the command.
    """
    dtypes = _check_output(model, options, dtypes)
    dims = model.usual_dims if options.dims is None else options.dims
    _check_dims(model, dims, rules)
    layers = model.num_layers if options.layers is None else options.layers
    _check_layers(model, layers)
    normalized = model.normalize if options.normalize is None else options.normalize
    cut = Cut(layers=layers, dims=dims, normalized=normalized)
    dtype = _dtype(options.dtype, dims, dtypes)
    return VectorSpec(
        model=model.qualified_name,
        dims=dims,
        dtype=dtype,
        layers=cut.layers,
        pooling=_POOLINGS.get(model.output, model.pooling),
        normalized=cut.normalized,
        ranges=_ranges(model, cut, dtypes, rules) if dtype == "int8" else None,
        output=model.output,
        max_vectors=model.max_vectors,
        similarity=model.similarity,
        prompt=resolve_prompt(model, options.prompt),
    )


def check_late(model: ModelBundle, chunking: Chunking, layers: int) -> None:
    """Raises InvalidCommandError for late chunking if the model has no graph for it."""
    if not chunking.late or (model.late is not None and layers == model.num_layers):
        return
    if model.pooling != "mean":
        why = f"{model.name} pools by {model.pooling}, expected mean, which parts of a text have"
    elif model.family == "onnx":
        why = f"{model.name} is a foreign ONNX graph, expected one that Fletcher wrote"
    elif model.has_exits:
        why = f"{model.name} has exits; add it again without --exits"
    else:
        why = f"{model.name} was added by a Fletcher without late chunking; add it again"
    raise InvalidCommandError(
        f"`chunking` is {chunking}: {why}, or leave `late` out",
        field="chunking",
        allowed=[str(replace(chunking, late=False))],
    )


def _check_output(
    model: ModelBundle, options: EmbedCommand, dtypes: tuple[str, ...]
) -> tuple[str, ...]:
    """Checks a command against the kind of vectors that a model gives.

    Returns:
        The element types that both this kind of vectors and the destination allow.
    """
    if options.output not in (None, model.output):
        raise InvalidCommandError(
            f"`output` is {options.output}, expected {model.output}, for which {model.name} was "
            f"trained; leave `output` out, or ask a model that gives {options.output}",
            field="output",
            allowed=[model.output],
        )
    if model.output == "dense":
        return dtypes
    for name, given, own in (
        ("dims", options.dims, model.dim),
        ("normalize", options.normalize, model.normalize),
        ("chunking", options.chunking, "none"),
    ):
        if given not in (None, own):
            raise InvalidCommandError(
                f"`{name}` is {given}, expected {own}: {model.name} gives {model.output} vectors, "
                "which are never changed; leave it out",
                field=name,
                allowed=[str(own)],
            )
    possible = tuple(one for one in DTYPES[model.output] if one in dtypes)
    if options.dtype not in (None, *possible):
        raise InvalidCommandError(
            f"`dtype` is {options.dtype}, expected one of the {model.output} vectors that "
            f"{model.name} gives: {', '.join(possible)}",
            field="dtype",
            allowed=possible,
        )
    return possible


def _check_dims(model: ModelBundle, dims: int, rules: OutputConfig) -> None:
    if dims in model.dims or (dims <= model.dim and rules.allow_undeclared):
        return
    allowed = [str(one) for one in model.dims]
    declared = ", ".join(allowed)
    expected = f"at most {model.dim}: {model.name} declares {declared}"
    if dims <= model.dim:
        expected = (
            f"one that {model.name} declares: {declared}; a server with --allow-undeclared gives "
            "any, with an unknown loss of quality"
        )
    message = f"`dims` is {dims}, expected {expected}"
    raise DimensionMismatchError(message, field="dims", allowed=allowed)


def _check_layers(model: ModelBundle, layers: int) -> None:
    """Checks the exit layer. Only declared layers are possible: a block ends there."""
    if layers in model.layers:
        return
    allowed = [str(one) for one in model.layers]
    has = "exits after layers" if model.has_exits else "its only exit after layer"
    message = f"`layers` is {layers}, and {model.name} has {has} {', '.join(allowed)}"
    if 0 < layers < model.num_layers:
        message += "; `fletcher model add` with --exits makes others from a checkpoint"
    raise InvalidCommandError(message, field="layers", allowed=allowed)


def _dtype(asked: str | None, dims: int, dtypes: tuple[str, ...]) -> str:
    dtype = asked or ("float16" if "float16" in dtypes else dtypes[0])
    if dtype not in dtypes:
        raise InvalidCommandError(
            f"`dtype` is {dtype}, expected one that the store takes: {', '.join(dtypes)}",
            field="dtype",
            allowed=dtypes,
        )
    if dtype == "ubinary" and dims % 8:
        others = [one for one in dtypes if one != dtype]
        raise InvalidCommandError(
            f"`dtype` is ubinary, which packs 8 dimensions into a byte, and `dims` is {dims}, "
            f"expected a multiple of 8; change `dims`, or ask for {', '.join(others)}",
            field="dtype",
            allowed=others,
        )
    return dtype


def _ranges(
    model: ModelBundle, cut: Cut, dtypes: tuple[str, ...], rules: OutputConfig
) -> Ranges | None:
    ranges = model.calibration.ranges
    if rules.int8 == "row" or (rules.int8 == "auto" and cut not in ranges):
        return None
    if cut in ranges:
        return ranges[cut]
    have = "; ".join(map(str, sorted(ranges))) or "none"
    raise InvalidCommandError(
        f"`dtype` is int8, which this server quantizes by ranges, and {model.name} has none for "
        f"{cut}, only for: {have}. Run `fletcher model calibrate {model.qualified_name}`, or start "
        "the server with --int8 auto or row, which scales each row",
        field="dtype",
        allowed=[one for one in dtypes if one != "int8"],
    )
