"""What is compared: engines, depths, widths, types and ways to cut, named in lists."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fletcher.config.option import nearest
from fletcher.core.chunking import AGGREGATIONS, Chunking
from fletcher.core.command import CHOICES
from fletcher.errors import InvalidCommandError

KEYS = ("backend", "precision", "layers", "dims", "dtype", "chunking")


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs the model: a backend, its arithmetic and `cpu` or `cuda`, as options name them."""

    backend: str
    precision: str
    device: str = "cpu"

    def __str__(self) -> str:
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.backend} {self.precision}{where}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to make vectors.

    Attributes:
        engine: What runs the model.
        layers: Exit layer; None: all layers.
        dims: Leading dimensions; None: all.
        dtype: Element type.
        chunking: How documents are cut, and their chunks made one vector; None: not at all.
    """

    engine: Engine
    layers: int | None = None
    dims: int | None = None
    dtype: str = "float32"
    chunking: str | None = None

    def __str__(self) -> str:
        cut = "" if self.chunking is None else f", {self.chunking}"
        return f"{self.engine}, {self.layers} layers, {self.dims} dims, {self.dtype}{cut}"

    def of(self, model: Mapping[str, Any]) -> Variant:
        """The same with `layers` and `dims` as numbers, as the server's ModelInfo has them."""
        return dataclasses.replace(
            self, layers=self.layers or model["num_layers"], dims=self.dims or model["dim"]
        )


def parse(text: str, engines: Sequence[Engine]) -> list[Variant]:
    """Every combination of the values of a list such as `backend=openvino dims=384,128`.

    Args:
        text: `KEY=VALUE,...` with spaces between; keys are KEYS, and one that is not there leaves
            the default.
        engines: Those that can be had, the one that a server would take first: the default, and
            of a backend without a precision the first with that backend.

    Raises:
        InvalidCommandError: A key or a value that is none.
    """
    default = engines[0]
    usual_precision = {one.backend: one.precision for one in reversed(engines)}
    lists: dict[str, Sequence[str]] = {
        "backend": [default.backend],
        "precision": [""],
        "layers": [""],
        "dims": [""],
        "dtype": ["float32"],
        "chunking": ["none"],
    }
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
                f"`variants` has {word!r}, which leaves out a value", field="variants"
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
    return [
        Variant(
            Engine(
                backend,
                precision or usual_precision.get(backend, default.precision),
                default.device,
            ),
            _number("layers", layers),
            _number("dims", dims),
            dtype,
            _chunking(chunking),
        )
        for backend, precision, layers, dims, dtype, chunking in itertools.product(
            *(lists[key] for key in KEYS)
        )
    ]


def usual(engines: Sequence[Engine], model: Mapping[str, Any]) -> list[Variant]:
    """What is worth a look where nobody says what: each choice alone, and width with type.

    Args:
        engines: Those that can be had, the one that a server would take first.
        model: ModelInfo; only depths and widths that it declares.
    """
    first = engines[0]
    layers = [one for one in model["layers"] if one != model["num_layers"]]
    both = itertools.product(sorted(model["dims"], reverse=True), CHOICES["dtype"])
    return [
        *(Variant(engine).of(model) for engine in engines),
        *(Variant(first, one).of(model) for one in layers),
        *(
            Variant(first, None, dims, dtype).of(model)
            for dims, dtype in both
            if dtype != "ubinary" or dims % 8 == 0  # eight dimensions are a byte
        ),
    ]


def _chunking(text: str) -> str | None:
    chunking = Chunking.from_text(text)
    if chunking is not None and chunking.rows:
        raise InvalidCommandError(
            f"`chunking` is {text!r} in `variants`, which gives a document several vectors; ask "
            "for one that makes one of them",
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
