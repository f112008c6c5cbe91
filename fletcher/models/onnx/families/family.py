"""Families of models: readers of config.json and names of tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fletcher.errors import ModelError
from fletcher.models.bundle.spec import Output
from fletcher.models.checkpoint.config_json import EXPORT, Config
from fletcher.models.checkpoint.config_keys import ReadConfig
from fletcher.models.checkpoint.output_kind import COLBERT
from fletcher.models.checkpoint.static import table_name
from fletcher.models.checkpoint.weights import Weights
from fletcher.models.onnx.architecture import NUM_BUCKETS, Architecture
from fletcher.models.onnx.encoder import Array

# Name of a stored tensor. If the tensor joins several as its rows: its name, index of the part, and
# number of parts.
Stored = str | tuple[str, int, int]

_LAYER_TENSOR = re.compile(r"layer\.(\d+)\.(.+)\.(weight|scale|bias)")
# Ends of names of buffers, which old checkpoints contain beside their weights.
_BUFFERS = ("position_ids", "token_type_ids", "inv_freq")
# Names of the linear layer that ColBERT models have after the last transformer layer.
_PROJECTION = re.compile(r"\w*(linear|proj|projection)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint's names for the tensors of `encoder.Tensors`.

    Attributes:
        layers: Prefix of a layer's tensors, with `{}` for the layer's number.
        model: Names of tensors outside of layers, without `.weight` and `.bias`.
        layer: Names of tensors within a layer, without `.weight` and `.bias`.
    """

    layers: str
    model: Mapping[str, str]
    layer: Mapping[str, Stored]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models.

    Attributes:
        name: Name in fletcher.json.
        read: Function that reads the Architecture from config.json. It raises ModelError if the
            model computes something that Fletcher's graphs do not.
        prefixes: Prefixes that checkpoints put in front of all tensor names.
        layouts: Layouts that the family's checkpoints have; the first is the default.
        ignored: Keys of config.json that the family's reference code does not use for vectors.
        is_static: Whether the model is a table of embeddings without layers.
    """

    name: str
    read: Callable[[Config], Architecture]
    prefixes: tuple[str, ...]
    layouts: tuple[Layout, ...]
    ignored: frozenset[str] = frozenset()
    is_static: bool = False

    def architecture(self, config: Config) -> Architecture:
        """Read config.json; check that it has no key that Fletcher does not know.

        Raises:
            ModelError: A value is invalid or not supported, or a key is unknown.
        """
        known = ReadConfig(config)
        architecture = self.read(known)
        known.check_all_known(self.ignored)
        return architecture

    def tensors(self, weights: Weights, architecture: Architecture) -> StoredTensors:
        """The checkpoint's weights by their role in a graph."""
        kind = StaticTensors if self.is_static else CheckpointTensors
        return kind(weights, architecture, self)


def fused(name: str, parts: str | Sequence[str]) -> dict[str, Stored]:
    """Layout of `parts`, which a checkpoint joins in this order as rows of one tensor."""
    return {part: (name, place, len(parts)) for place, part in enumerate(parts)}


class StoredTensors(Protocol):
    """Weights as `encoder.Tensors`, with a check of the tensors left unread."""

    def read_tensor(self, name: str) -> Array: ...

    def check_all_read(self, output: Output, num_layers: int) -> None:
        """Check that every tensor that could change the output was read.

        Raises:
            ModelError: A tensor that could change the output was not read.
        """


class StaticTensors:
    """Table of embeddings of a static model, with a row of zeros at its end."""

    def __init__(self, weights: Weights, architecture: Architecture, _family: Family) -> None:
        self._weights = weights
        self._shape = (architecture.vocab_size - 1, architecture.hidden)

    def read_tensor(self, name: str) -> Array:
        if name != "embeddings.words":
            raise ValueError(f"a static model has no {name}")
        table = self._weights.read_tensor(table_name(self._weights), self._shape)
        return np.concatenate([table, np.zeros((1, self._shape[1]), np.float32)])

    def check_all_read(self, _output: Output, _num_layers: int) -> None:
        """Do nothing: `read_static_config` accepts a single tensor."""


class CheckpointTensors:
    """A checkpoint's weights as `encoder.Tensors`, checked for the expected shapes."""

    def __init__(self, weights: Weights, architecture: Architecture, family: Family) -> None:
        self._weights = weights
        self._architecture = architecture

        def fits(layout: Layout) -> bool:
            return weights.has(f"{layout.layers.format(0)}{_parts(layout.layer['q'])[0]}.weight")

        self._layout = next(filter(fits, family.layouts), family.layouts[0])

    def read_tensor(self, name: str) -> Array:
        architecture = self._architecture
        if match := _LAYER_TENSOR.fullmatch(name):
            return self._of_layer(*match.groups())
        stem, _, kind = name.rpartition(".")
        if stem in ("embeddings.norm", "final.norm"):
            return self._norm(stem, kind)
        rows = {
            "embeddings.words": architecture.vocab_size,
            "embeddings.positions": architecture.max_length + architecture.position_offset,
            "embeddings.types": architecture.type_vocab_size,
            "distances": NUM_BUCKETS,
        }[name]
        width = architecture.num_heads if name == "distances" else architecture.hidden
        table = self._weights.read_tensor(f"{self._layout.model[name]}.weight", (rows, width))
        if name == "embeddings.types":
            return table[:1]  # every token of a single text has type 0
        if name == "embeddings.positions":
            table = table[architecture.position_offset :]
            if architecture.type_vocab_size:
                return np.asarray(table + self.read_tensor("embeddings.types"), dtype=np.float32)
        return table

    def check_all_read(self, output: Output, num_layers: int) -> None:
        """Check that every tensor that could change the output was read.

        Layers after the first `num_layers` are left out, as transformers does. The output depends
        on the tensors of layers and embeddings, and on projections after the last layer. Heads for
        other tasks, such as masked tokens and classes, may stay unread.

        Raises:
            ModelError: A tensor that could change the output was not read.
        """
        layers = self._layout.layers.partition("{}")[0]
        for name in self._weights.unread():
            number = name.removeprefix(layers).partition(".")[0]
            if name.startswith(layers) and number.isdigit() and int(number) >= num_layers:
                continue
            if name.startswith((layers, "embeddings.")) and not name.endswith(_BUFFERS):
                raise ModelError(
                    f"the checkpoint has a tensor `{name}` that its config.json does not mention: "
                    f"the model computes more than Fletcher's graphs of its family; {EXPORT}"
                )
            # The projection of token vectors was read as a Dense layer.
            if output != "multi" and _PROJECTION.fullmatch(name):
                raise ModelError(
                    f"the checkpoint has a tensor `{name}`, the projection of a token-vector "
                    f"model, but no file mentions it, and {output} vectors would lack it; add its "
                    f"{COLBERT}, or a modules.json that lists it as Dense"
                )

    def _norm(self, name: str, kind: str) -> Array:
        stored = f"{self._layout.model[name]}.{'bias' if kind == 'bias' else 'weight'}"
        return self._weights.read_tensor(stored, (self._architecture.hidden,))

    def _of_layer(self, number: str, what: str, kind: str) -> Array:
        """Read a layer's tensor, where weights become [from, to].

        Tensors of queries are multiplied by the attention's scale.
        """
        architecture, layout = self._architecture, self._layout
        stored, part, parts = _parts(layout.layer[what])
        rows, *columns = architecture.shape(what)
        shape = (rows * parts, *(columns if kind == "weight" else ()))
        name = f"{layout.layers.format(number)}{stored}.{'bias' if kind == 'bias' else 'weight'}"
        tensor = self._weights.read_tensor(name, shape)[part * rows : (part + 1) * rows]
        if kind == "weight":
            tensor = tensor.T
        if what == ("q.norm" if architecture.head_norm else "q"):
            scale = np.float32(1 / math.sqrt(architecture.head_width))
            return np.asarray(tensor * scale, dtype=np.float32)
        return np.asarray(tensor)


def _parts(stored: Stored) -> tuple[str, int, int]:
    return (stored, 0, 1) if isinstance(stored, str) else stored
