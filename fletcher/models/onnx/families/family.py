"""What a family of models is: how to read its config.json, and what its weights are called."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fletcher.errors import ModelError
from fletcher.models.bundle.spec import Output
from fletcher.models.checkpoint.config_json import Config
from fletcher.models.checkpoint.output_kind import COLBERT
from fletcher.models.checkpoint.weights import Weights
from fletcher.models.onnx.architecture import NUM_BUCKETS, Architecture
from fletcher.models.onnx.encoder import Array

# A tensor of a checkpoint, or as many equal parts of its rows: the name, which part, of how many.
Stored = str | tuple[str, int, int]

_LAYER_TENSOR = re.compile(r"layer\.(\d+)\.(.+)\.(weight|scale|bias)")
# Buffers that old checkpoints hold beside their weights.
_BUFFERS = ("position_ids", "token_type_ids", "inv_freq")
# A ColBERT's product after the last layer, by the names that its libraries give it.
_PROJECTION = re.compile(r"\w*(linear|proj|projection)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint calls the tensors that `encoder.Tensors` has.

    Attributes:
        layers: What the names of a layer's tensors start with, `{}` for its number.
        model: Names outside of layers, without `.weight` and `.bias`.
        layer: Names within a layer.
    """

    layers: str
    model: Mapping[str, str]
    layer: Mapping[str, Stored]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models.

    Attributes:
        name: As fletcher.json says it.
        read: Makes an Architecture of config.json; raises ModelError where the model computes
            something that a graph here cannot.
        prefixes: What checkpoints put before all their names.
        layouts: Its layouts; the first is that of a checkpoint which has none of their tensors.
    """

    name: str
    read: Callable[[Config], Architecture]
    prefixes: tuple[str, ...]
    layouts: tuple[Layout, ...]


class CheckpointTensors:
    """A checkpoint's weights as `encoder.Tensors`.

    Args:
        weights: The checkpoint's.
        architecture: What shapes they have.
        family: What they are called.
    """

    def __init__(self, weights: Weights, architecture: Architecture, family: Family) -> None:
        self._weights = weights
        self._architecture = architecture
        self._layout = next(
            (
                layout
                for layout in family.layouts
                if weights.has(f"{layout.layers.format(0)}{_parts(layout.layer['q'])[0]}.weight")
            ),
            family.layouts[0],
        )

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
            return table[:1]  # a single text has token type 0 throughout
        if name == "embeddings.positions":
            table = table[architecture.position_offset :]
            if architecture.type_vocab_size:
                return np.asarray(table + self.read_tensor("embeddings.types"), dtype=np.float32)
        return table

    def check_all_read(self, output: Output) -> None:
        """Raises ModelError where a tensor that changes `output` is in no graph.

        Those are all of layers and embeddings, and projections after the last layer. Heads for
        other tasks, such as those for masked tokens and for classes, are left out on purpose.
        """
        layers = self._layout.layers.partition("{}")[0]
        for name in self._weights.unread():
            if name.startswith((layers, "embeddings.")) and not name.endswith(_BUFFERS):
                raise ModelError(
                    f"the checkpoint has a tensor `{name}` that its config.json does not ask for: "
                    "it computes more than graphs of its family do here; export it to ONNX and "
                    "add that file"
                )
            # What token vectors are projected by was read as a Dense layer.
            if output != "multi" and _PROJECTION.fullmatch(name):
                raise ModelError(
                    f"the checkpoint has a tensor `{name}`, as models of token vectors have it "
                    f"after the last layer, but no file says so, and {output} vectors would be "
                    f"made without it; put its {COLBERT} beside it, or a modules.json that lists "
                    "it as Dense"
                )

    def _norm(self, name: str, kind: str) -> Array:
        stored = f"{self._layout.model[name]}.{'bias' if kind == 'bias' else 'weight'}"
        return self._weights.read_tensor(stored, (self._architecture.hidden,))

    def _of_layer(self, number: str, what: str, kind: str) -> Array:
        """Weights as [from, to]; the attention's scale is in what comes last before the scores."""
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
