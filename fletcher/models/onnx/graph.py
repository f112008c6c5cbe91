"""Builder of ONNX graphs with the weights in a separate file beside the graph.

The protobuf messages are defined in `proto/fletcher/models/onnx/onnx.proto`, a copy of ONNX's
schema under Fletcher's package name. The `onnx` package also defines these messages. But that
package is large, and Fletcher needs nothing else of it at run time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from fletcher.models.onnx.onnx_pb2 import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    TensorProto,
    ValueInfoProto,
)

IR_VERSION = 9
OPSET = 20  # the first operator set with Gelu as one operator
# Domain of ONNX Runtime's own operators:
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
MICROSOFT = "com.microsoft"
GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.weights"
ALIGNMENT = 4096  # a page: engines map the weights into memory instead of copying them

# Element types, as values of the attribute `to` of Cast.
ONNX_FLOAT, ONNX_FLOAT16 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)
ONNX_INT64, ONNX_BOOL = int(TensorProto.INT64), 9  # our copy of the schema names no BOOL

_EXTERNAL_FROM_BYTES = 1024  # smaller tensors, such as shapes, load faster from the graph file
_ELEMENT_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.float16): TensorProto.FLOAT16,
}

AnyArray = npt.NDArray[Any]


def read_model(path: Path) -> ModelProto:
    """Parse an ONNX file.

    Raises:
        ValueError: The file is not an ONNX model, or is cut off.
        OSError: The file cannot be read.
    """
    try:
        model = ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(str(error)) from None
    if not model.HasField("graph"):
        raise ValueError("it has no graph")
    return model


class GraphBuilder:
    """Builder of one graph. Weights are written to disk when added, nodes by `save`.

    `file` is the name of the graph's file. The name of the weights' file differs in the suffix.
    """

    def __init__(self, folder: Path, name: str, file: str = GRAPH_FILE) -> None:
        self._path = folder / file
        self._name = name
        self._nodes: list[NodeProto] = []
        self._tensors: list[TensorProto] = []
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
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
        """Create a builder of a graph with the same first nodes and the same weights.

        Write the fork while this builder is open. Both graphs are in the same folder and share the
        constants that are written so far. `last` is an output of the last common node.
        """
        fork = copy.copy(self)
        fork._path = self._path.with_name(file)
        place = [last in node.output for node in self._nodes].index(True) + 1
        fork._nodes = self._nodes[:place]
        left = {name for node in self._nodes[place:] for name in node.output}
        fork._names = self._names - left
        fork._inherited = frozenset(self._constants)
        fork._tensors, fork._inputs, fork._outputs = self._tensors[:], self._inputs[:], []
        return fork

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declare an input; a string in `shape` names a size known only at run time."""
        self._inputs.append(_value_info(name, dtype, shape))
        return self._unique(name)

    def output(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> None:
        """Declare the value `name`, which a node makes, as an output of the graph."""
        self._outputs.append(_value_info(name, dtype, shape))

    def constant(self, name: str, value: AnyArray | Sequence[int]) -> str:
        """Add a weight or a small constant. A sequence of integers becomes int64."""
        if name in self._inherited:
            return name
        integers = not isinstance(value, np.ndarray)
        array = np.ascontiguousarray(value, dtype=np.int64 if integers else None)
        tensor = TensorProto(dims=array.shape, data_type=_ELEMENT_TYPES[array.dtype], name=name)
        if array.nbytes < _EXTERNAL_FROM_BYTES:
            tensor.raw_data = array.tobytes()
        else:
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=self._weights_path.name)
            tensor.external_data.add(key="offset", value=str(self._weights.tell()))
            tensor.external_data.add(key="length", value=str(array.nbytes))
            self._weights.write(array.data.cast("B"))
            self._weights.write(bytes(-self._weights.tell() % ALIGNMENT))
        self._tensors.append(tensor)
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
        """Add a node with one output, called `name`; return that name.

        An empty name in `inputs` omits an optional input. `domain` is the operator's domain; it is
        empty for ONNX's standard operators.
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
        """Add a node with several outputs; return the outputs' names."""
        node = NodeProto(
            input=inputs,
            output=[self._unique(one) for one in outputs],
            name=outputs[0],
            op_type=operator,
            attribute=[_attribute(key, value) for key, value in attributes.items()],
        )
        if domain:
            node.domain = domain
            self._domains.add(domain)
        self._nodes.append(node)
        return outputs

    def save(self) -> None:
        """Write the graph file. The same graph gives the same bytes on every machine."""
        self._weights.flush()
        model = ModelProto(
            ir_version=IR_VERSION,
            producer_name="fletcher",
            graph=GraphProto(
                node=self._nodes,
                name=self._name,
                initializer=self._tensors,
                input=self._inputs,
                output=self._outputs,
            ),
            opset_import=[
                OperatorSetIdProto(version=OPSET),
                *(OperatorSetIdProto(domain=one, version=1) for one in sorted(self._domains)),
            ],
        )
        self._path.write_bytes(model.SerializeToString(deterministic=True))

    def _unique(self, name: str) -> str:
        if name in self._names:
            raise ValueError(f"the graph has a value `{name}` already")
        self._names.add(name)
        return name


def _value_info(name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> ValueInfoProto:
    value = ValueInfoProto(name=name)
    tensor = value.type.tensor_type
    tensor.elem_type = _ELEMENT_TYPES[np.dtype(dtype)]
    for size in shape:
        if isinstance(size, int):
            tensor.shape.dim.add(dim_value=size)
        else:
            tensor.shape.dim.add(dim_param=size)
    return value


def _attribute(name: str, value: float | int | str | Sequence[int]) -> AttributeProto:
    if isinstance(value, float):
        return AttributeProto(name=name, type=AttributeProto.FLOAT, f=value)
    if isinstance(value, int):
        return AttributeProto(name=name, type=AttributeProto.INT, i=value)
    if isinstance(value, str):
        return AttributeProto(name=name, type=AttributeProto.STRING, s=value.encode())
    return AttributeProto(name=name, type=AttributeProto.INTS, ints=value)
