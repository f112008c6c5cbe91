"""Search for indexes and comparisons that a graph computes in floating point.

OpenVINO in bfloat16 rounds every float of a graph, whatever the float means. An index from 511 to
519 becomes 512 or 520 then, and another row of a table is read. So graphs compute indexes and
comparisons in integers. Graphs that older versions of Fletcher wrote do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.onnx.graph import ONNX_BOOL, ONNX_FLOAT, ONNX_FLOAT16, read_model
from fletcher.models.onnx.onnx_pb2 import GraphProto, NodeProto

FLOATS = frozenset((ONNX_FLOAT, ONNX_FLOAT16, 11, 16))  # with float64 and bfloat16
_INT64 = 7
_COMPARISONS = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"))
_LOGIC = frozenset(("And", "Or", "Xor", "Not", "IsNaN", "IsInf"))
_INTEGERS = frozenset(("Shape", "Size", "ArgMax", "ArgMin", "NonZero"))


def float_indices(graph: GraphProto) -> list[str]:
    """Names of the nodes that make an integer or a truth value from a float.

    These are conversions to integers, comparisons, and operators that look for the largest value.
    """
    kinds = element_types(graph)
    found = []
    for node in graph.node:
        floats = any(kinds.get(name, ONNX_FLOAT) in FLOATS for name in node.input if name)
        if floats and (
            node.op_type in (*_COMPARISONS, "ArgMax", "ArgMin", "NonZero", "IsNaN", "IsInf")
            or (node.op_type == "Cast" and _attributes(node)["to"] not in FLOATS)
        ):
            found.append(node.name or node.output[0])
    return found


def element_types(graph: GraphProto) -> dict[str, int]:
    """Element type of each value in a graph that Fletcher wrote, as a number of ONNX.

    An operator that is in no list has outputs with the type of its first input.
    """
    kinds = {one.name: one.data_type for one in graph.initializer}
    kinds |= {one.name: one.type.tensor_type.elem_type for one in graph.input}
    for node in graph.node:
        kind = _output_type(node, kinds)
        kinds |= dict.fromkeys(node.output, kind)
    return kinds


def _output_type(node: NodeProto, kinds: Mapping[str, int]) -> int:
    if node.op_type == "Cast":
        return _attributes(node)["to"]
    if node.op_type in _COMPARISONS or node.op_type in _LOGIC:
        return ONNX_BOOL
    if node.op_type in _INTEGERS:
        return _INT64
    place = 1 if node.op_type == "Where" else 0
    return kinds.get(node.input[place], ONNX_FLOAT) if len(node.input) > place else ONNX_FLOAT


def _attributes(node: NodeProto) -> dict[str, int]:
    return {one.name: one.i for one in node.attribute}


def needs_float32(bundle: ModelBundle) -> bool:
    """Whether an older Fletcher wrote the graphs, with indexes in floating point.

    Graphs of .onnx files are not judged: some of their comparisons of floats are harmless.

    Raises:
        ModelError: A graph cannot be read.
    """
    if bundle.family == "onnx":
        return False
    late = [] if bundle.late is None else [bundle.late]
    try:
        return any(_in_file(path, path.stat().st_mtime_ns) for path in (*bundle.blocks, *late))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`model` {bundle.name}: its graph cannot be read ({type(error).__name__}); check it "
            f"with `fletcher model verify {bundle.qualified_name}`",
            field="model",
        ) from error


@lru_cache(64)
def _in_file(path: Path, _changed: int) -> bool:
    return bool(float_indices(read_model(path).graph))
