"""A small builder of ONNX graphs, with the weights in one file beside the graph.

Field numbers are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fletcher.models.onnx.protowire import bytes_field, float_field, int_field

IR_VERSION = 9
OPSET = 20  # the first with Gelu as one operator
# ONNX Runtime's own operators, for what ONNX has none:
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
MICROSOFT = "com.microsoft"
GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.weights"
# Between the segments of a model with exits: what one gives and the next takes.
HANDED_ON, HIDDEN = "handed_on", "hidden"
ALIGNMENT = 4096  # a page: engines map the weights into memory instead of copying them

_EXTERNAL_FROM_BYTES = 1024  # smaller tensors (shapes, scalars) are read faster in the graph itself
_ELEMENT_TYPES = {
    np.dtype(np.float32): 1,
    np.dtype(np.int32): 6,
    np.dtype(np.int64): 7,
    np.dtype(np.float16): 10,
}
_ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_STRING, _ATTRIBUTE_INTS = 1, 2, 3, 7

AnyArray = npt.NDArray[Any]


class GraphBuilder:
    """Collects nodes and weights of one graph; weights go to disk as they come.

    Args:
        folder: Where the graph and its weights are written.
        name: The graph's name.
        file: Its file's name; that of the weights differs in the suffix.
    """

    def __init__(self, folder: Path, name: str, file: str = GRAPH_FILE) -> None:
        self._path = folder / file
        self._name = name
        self._nodes: list[tuple[Sequence[str], bytes]] = []  # each with what it gives
        self._tensors: list[bytes] = []
        self._inputs: list[bytes] = []
        self._outputs: list[bytes] = []
        self._names: set[str] = set()
        self._inherited: frozenset[str] = frozenset()
        self._constants: list[str] = []
        self._domains: set[str] = set()
        self._weights_path = self._path.with_suffix(Path(WEIGHTS_FILE).suffix)
        self._weights: BinaryIO = self._weights_path.open("wb")

    def __enter__(self) -> GraphBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        self._weights.close()

    def fork(self, file: str, last: str) -> GraphBuilder:
        """Another graph, which goes on behind one of this one's nodes, on the same weights.

        It is to be written while this one is open. A constant that this one has is the same there.

        Args:
            file: The other's file in the same folder.
            last: What the last node gives that they have in common.
        """
        fork = copy.copy(self)
        fork._path = self._path.with_name(file)
        place = [last in outputs for outputs, _ in self._nodes].index(True) + 1
        fork._nodes = self._nodes[:place]
        left = {name for outputs, _ in self._nodes[place:] for name in outputs}
        fork._names = self._names - left
        fork._inherited = frozenset(self._constants)
        fork._tensors, fork._inputs, fork._outputs = self._tensors[:], self._inputs[:], []
        return fork

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declares an input; a string in `shape` is a dimension known only at run time."""
        self._inputs.append(_value_info(name, dtype, shape))
        return self._unique(name)

    def output(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> None:
        """Declares the value `name`, made by a node, as an output."""
        self._outputs.append(_value_info(name, dtype, shape))

    def constant(self, name: str, value: AnyArray | Sequence[int]) -> str:
        """A weight or a small constant; a sequence of integers becomes int64."""
        if name in self._inherited:
            return name
        integers = not isinstance(value, np.ndarray)
        array = np.ascontiguousarray(value, dtype=np.int64 if integers else None)
        message = b"".join(int_field(1, size) for size in array.shape)
        message += int_field(2, _ELEMENT_TYPES[array.dtype]) + bytes_field(8, name)
        if array.nbytes < _EXTERNAL_FROM_BYTES:
            message += bytes_field(9, array.tobytes())
        else:
            offset = self._append(array)
            place = {
                "location": self._weights_path.name,
                "offset": str(offset),
                "length": str(array.nbytes),
            }
            for key, text in place.items():
                message += bytes_field(13, bytes_field(1, key) + bytes_field(2, text))
            message += int_field(14, 1)  # data_location: EXTERNAL
        self._tensors.append(message)
        self._constants.append(name)
        return self._unique(name)

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        *,
        domain: str = "",
        **attributes: float | int | str | Sequence[int],
    ) -> str:
        """Adds a node with one output, called `name`; returns that name.

        An empty name in `inputs` is an optional input left out. `domain` is where the operator is
        defined, empty for ONNX itself.
        """
        return self.nodes(operator, inputs, (name,), domain=domain, **attributes)[0]

    def nodes(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: float | int | str | Sequence[int],
    ) -> Sequence[str]:
        """Adds a node with the outputs named; returns them."""
        message = b"".join(bytes_field(1, one) for one in inputs)
        message += b"".join(bytes_field(2, self._unique(one)) for one in outputs)
        message += bytes_field(3, outputs[0]) + bytes_field(4, operator)
        for key, value in attributes.items():
            message += bytes_field(5, _attribute(key, value))
        if domain:
            message += bytes_field(7, domain)
            self._domains.add(domain)
        self._nodes.append((outputs, message))
        return outputs

    def save(self) -> None:
        """Writes the graph; the same calls give the same bytes on every machine."""
        self._weights.flush()
        graph = b"".join(bytes_field(1, node) for _, node in self._nodes)
        graph += bytes_field(2, self._name)
        graph += b"".join(bytes_field(5, tensor) for tensor in self._tensors)
        graph += b"".join(bytes_field(11, one) for one in self._inputs)
        graph += b"".join(bytes_field(12, one) for one in self._outputs)
        model = int_field(1, IR_VERSION) + bytes_field(2, "fletcher") + bytes_field(7, graph)
        model += bytes_field(8, int_field(2, OPSET))
        for domain in sorted(self._domains):
            model += bytes_field(8, bytes_field(1, domain) + int_field(2, 1))
        self._path.write_bytes(model)

    def _append(self, array: AnyArray) -> int:
        offset = self._weights.tell()
        self._weights.write(array.data.cast("B"))
        self._weights.write(bytes(-self._weights.tell() % ALIGNMENT))
        return offset

    def _unique(self, name: str) -> str:
        if name in self._names:
            raise ValueError(f"the graph has a value `{name}` already")
        self._names.add(name)
        return name


def _value_info(name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(
        bytes_field(1, int_field(1, size) if isinstance(size, int) else bytes_field(2, size))
        for size in shape
    )
    tensor = int_field(1, _ELEMENT_TYPES[np.dtype(dtype)]) + bytes_field(2, dims)
    return bytes_field(1, name) + bytes_field(2, bytes_field(1, tensor))


def _attribute(name: str, value: float | int | str | Sequence[int]) -> bytes:
    if isinstance(value, float):
        body = float_field(2, value) + int_field(20, _ATTRIBUTE_FLOAT)
    elif isinstance(value, int):
        body = int_field(3, value) + int_field(20, _ATTRIBUTE_INT)
    elif isinstance(value, str):
        body = bytes_field(4, value) + int_field(20, _ATTRIBUTE_STRING)
    else:
        body = b"".join(int_field(8, one) for one in value) + int_field(20, _ATTRIBUTE_INTS)
    return bytes_field(1, name) + body
