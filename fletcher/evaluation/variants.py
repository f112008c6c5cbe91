"""Variants to compare: engines, layers, dimensions, types and chunking."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fletcher.config.option import nearest
from fletcher.core.chunking import AGGREGATIONS, Chunking
from fletcher.core.command import CHOICES
from fletcher.core.schema import DTYPES
from fletcher.errors import InvalidCommandError

# Keys in a list of variants, with their default values. An empty text stands for the value of the
# first engine or of the model.
_DEFAULTS = {
    **dict.fromkeys(("backend", "precision", "layers", "dims"), ""),
    "dtype": "float32",
    "chunking": "none",
}
KEYS = tuple(_DEFAULTS)


@dataclass(frozen=True, slots=True)
class Engine:
    """Backend, precision and device that run a model, named as in the options."""

    backend: str
    precision: str
    device: str = "cpu"

    def __str__(self) -> str:
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.backend} {self.precision}{where}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration of vectors.

    Attributes:
        engine: Engine that runs the model.
        layers: Number of layers; None: all.
        dims: Number of leading dimensions; None: all.
        dtype: Element type of the vectors.
        chunking: How documents are cut into chunks and the chunks aggregated; None: documents are
            not cut.
    """

    engine: Engine
    layers: int | None = None
    dims: int | None = None
    dtype: str = "float32"
    chunking: str | None = None

    def __str__(self) -> str:
        cut = "" if self.chunking is None else f", {self.chunking}"
        return f"{self.engine}, {self.layers} layers, {self.dims} dims, {self.dtype}{cut}"

    def resolved(self, model: Mapping[str, Any]) -> Variant:
        """The variant with None in `layers` and `dims` replaced by the model's numbers."""
        return dataclasses.replace(
            self, layers=self.layers or model["num_layers"], dims=self.dims or model["dim"]
        )


def parse_variants(text: str, engines: Sequence[Engine]) -> list[Variant]:
    """Parse lists of values such as `backend=openvino dims=384,128`.

    Returns a variant for every combination of the values.

    Args:
        text: Words `KEY=VALUE,...`, separated by spaces. The keys are those in KEYS. A key that is
            omitted has its default value.
        engines: Available engines. The first is the one that a server would choose, and the
            default. If `precision` is omitted, a backend takes the precision of its first engine.

    Raises:
        InvalidCommandError: A key or a value is unknown.
    """
    default = engines[0]
    usual_precision = {one.backend: one.precision for one in reversed(engines)}
    lists = {key: [value] for key, value in _DEFAULTS.items()}
    for word in text.split():
        key, equals, values = word.partition("=")
        if key not in KEYS:
            raise InvalidCommandError(
                f"`variants` has {word!r}{nearest(key, KEYS)}; expected KEY=VALUE,... with the "
                f"keys {', '.join(KEYS)}",
                field="variants",
                allowed=KEYS,
            )
        if not equals or not all(values.split(",")):
            raise InvalidCommandError(
                f"`variants` has {word!r}, which leaves out a value; expected KEY=VALUE,...",
                field="variants",
            )
        lists[key] = values.split(",")
    for dtype in lists["dtype"]:
        if dtype not in CHOICES["dtype"]:
            raise InvalidCommandError(
                f"`dtype` is {dtype!r} in `variants`, expected one of "
                f"{', '.join(CHOICES['dtype'])}",
                field="dtype",
                allowed=CHOICES["dtype"],
            )
    variants = []
    for backend, precision, layers, dims, dtype, chunking in itertools.product(*lists.values()):
        name = backend or default.backend
        usual = usual_precision.get(name, default.precision)
        engine = Engine(name, precision or usual, default.device)
        numbers = _number("layers", layers), _number("dims", dims)
        variants.append(Variant(engine, *numbers, dtype, _chunking(chunking)))
    return variants


def usual_variants(engines: Sequence[Engine], model: Mapping[str, Any]) -> list[Variant]:
    """Default variants: each engine, each depth, and each width with each type.

    Depths, widths and types are compared with the first engine only.

    Args:
        engines: Available engines. The first is the one that a server would choose.
        model: ModelInfo, which declares the layers and dimensions.
    """
    first = engines[0]
    layers = [one for one in model["layers"] if one != model["num_layers"]]
    variants = [Variant(engine) for engine in engines] + [Variant(first, one) for one in layers]
    dtypes = DTYPES[model.get("output", "dense")]
    for dims, dtype in itertools.product(sorted(model["dims"], reverse=True), dtypes):
        if dtype != "ubinary" or dims % 8 == 0:  # ubinary packs eight dimensions into a byte
            variants.append(Variant(first, None, dims, dtype))
    return [variant.resolved(model) for variant in variants]


def _chunking(text: str) -> str | None:
    chunking = Chunking.from_text(text)
    if chunking is not None and chunking.rows:
        raise InvalidCommandError(
            f"`chunking` is {text!r} in `variants`, which gives a document several vectors; "
            "choose one that aggregates them",
            field="chunking",
            allowed=[one for one in AGGREGATIONS if one != chunking.aggregation],
        )
    return None if chunking is None else str(chunking)


def _number(key: str, text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise InvalidCommandError(
            f"`{key}` is {text!r} in `variants`, expected a whole number above 0", field=key
        )
    return int(text)
