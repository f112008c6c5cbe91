"""Emulation of an engine that computes in bfloat16 whatever a graph computes in float32.

Runs on every processor: ONNX Runtime computes, and each float that a node makes is rounded. Real
engines round less often, because they fuse operators, so what holds here holds for them.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto, helper

from fletcher.models.onnx.float_indices import element_types
from fletcher.models.onnx.graph import read_model


def rounded(graph: Path, to: Path) -> Path:
    """Write a graph whose constants and values are rounded to bfloat16; return its path."""
    kinds = element_types(read_model(graph).graph)
    model: ModelProto = onnx.load(str(graph))
    nodes = []
    outputs = {one.name for one in model.graph.output}

    def add_rounding(name: str, result: str) -> None:
        nodes.append(helper.make_node("Cast", [name], [f"{result}.bf16"], to=TensorProto.BFLOAT16))
        nodes.append(helper.make_node("Cast", [f"{result}.bf16"], [result], to=TensorProto.FLOAT))

    new_names = {}
    given = [one.name for one in (*model.graph.initializer, *model.graph.input)]
    for name in given:
        if kinds[name] == TensorProto.FLOAT:
            new_names[name] = f"{name}.rounded"
            add_rounding(name, new_names[name])
    for node in model.graph.node:
        node.input[:] = [new_names.get(name, name) for name in node.input]
        made = [name for name in node.output if kinds[name] == TensorProto.FLOAT]
        node.output[:] = [f"{name}.exact" if name in made else name for name in node.output]
        nodes.append(node)
        for name in made:
            add_rounding(f"{name}.exact", name)
    assert outputs <= {name for node in nodes for name in node.output}
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path = to / graph.name
    onnx.save(
        model, str(path), save_as_external_data=True, location=f"{graph.stem}.rounded.weights"
    )
    return path
