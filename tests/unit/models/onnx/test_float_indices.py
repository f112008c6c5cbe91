"""No index, position, mask, comparison or count of a written graph is a float.

OpenVINO in bfloat16 rounds floats to 8 bits: 511 and 512 are one number there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fletcher.config.engine import EngineConfig
from fletcher.core.quantization import Ranges
from fletcher.errors import BackendError
from fletcher.inference import openvino
from fletcher.inference.backend import BackendConfig
from fletcher.inference.devices import resolve_replicas
from fletcher.models.bundle.bundle import ModelBundle, write_manifest
from fletcher.models.bundle.calibration import Calibration, Cut
from fletcher.models.bundle.registry import Registry
from fletcher.models.bundle.spec import MANIFEST, ModelSpec
from fletcher.models.onnx.families import FAMILIES
from fletcher.models.onnx.float_indices import FLOATS, element_types, float_indices
from fletcher.models.onnx.graph import ONNX_FLOAT, read_model
from fletcher.models.onnx.onnx_pb2 import GraphProto
from fletcher.models.onnx.packed import can_pack, write_packed
from tests.doubles.hosts import BFLOAT16_HOST

GOLDEN = Path(__file__).parents[3] / "golden"
CHECKPOINTS = sorted(
    path.parent
    for pattern in ("tiny", "families/*", "outputs/*")
    for path in GOLDEN.glob(f"{pattern}/config.json")
)
# Operators that keep whole numbers whole.
ARITHMETIC = frozenset(("Abs", "Add", "Sub", "Max", "Min", "Neg", "Sum", "ReduceSum", "CumSum"))
MOVES = frozenset(("Unsqueeze", "Squeeze", "Reshape", "Transpose", "Slice", "Expand", "Identity"))


def whole_floats(graph: GraphProto) -> list[str]:
    """Nodes that compute with whole numbers, such as counts and distances, as floats."""
    kinds = element_types(graph)
    whole: set[str] = set()  # floats that were integers
    found = []
    for node in graph.node:
        of_floats = [name for name in node.input if name and kinds[name] in FLOATS]
        if node.op_type == "Cast" and not of_floats and kinds[node.output[0]] in FLOATS:
            whole.update(node.output)
        if of_floats and whole.issuperset(of_floats) and node.op_type in ARITHMETIC:
            found.append(node.name)
        if node.op_type == "Mul" and of_floats and whole.issuperset(of_floats):
            found.append(node.name)
        if node.op_type in ("Add", "Sub") and whole.intersection(of_floats):
            found.append(node.name)
        if node.op_type in MOVES and whole.issuperset(of_floats) and of_floats:
            whole.update(node.output)
    return found


def graphs(checkpoint: Path, folder: Path) -> Iterator[tuple[str, GraphProto]]:
    registry = Registry(folder / "models")
    plain = registry.add_model(str(checkpoint), name="plain", progress=print)
    bundles = [plain]
    if plain.output == "dense":
        poolings = ["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"]
        for pooling in poolings:
            copy = folder / pooling
            shutil.copytree(checkpoint, copy)
            (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
            bundles.append(registry.add_model(str(copy), progress=print))
        exits = registry.add_model(str(checkpoint), name="exits", exits=(1,), progress=print)
        bundles.append(exits)
    for bundle in bundles:
        for path in bundle.folder.glob("*.onnx"):
            yield f"{bundle.name}/{path.name}", read_model(path).graph
        if can_pack(bundle) and not bundle.has_exits:
            for attention in ("packed", "standard"):
                packed = folder / f"{bundle.name}-{attention}"
                packed.mkdir()
                path = write_packed(bundle, packed, attention=attention)  # type: ignore[arg-type]
                yield f"{bundle.name}/{attention}", read_model(path).graph


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.name)
def test_graphs_compute_indexes_and_counts_in_integers(checkpoint: Path, tmp_path: Path) -> None:
    found = dict(graphs(checkpoint, tmp_path))
    assert len(found) >= 1
    for name, graph in found.items():
        assert (name, float_indices(graph)) == (name, [])
        assert (name, whole_floats(graph)) == (name, [])
        for value in graph.input:
            floats = value.type.tensor_type.elem_type in FLOATS
            assert not floats or value.name == "hidden"


def test_the_checkpoints_above_cover_every_family() -> None:
    kinds = {json.loads((one / "config.json").read_text())["model_type"] for one in CHECKPOINTS}
    # CamemBERT is the same Family as RoBERTa; static embeddings have no positions.
    assert kinds >= set(FAMILIES) - {"camembert", "static_embedding"}


def test_types_are_those_that_onnx_infers(tmp_path: Path) -> None:
    for checkpoint in CHECKPOINTS:
        bundle = Registry(tmp_path).add_model(str(checkpoint), progress=print)
        for path in bundle.folder.glob("*.onnx"):
            ours = element_types(read_model(path).graph)
            inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
            theirs = {one.name: one.type.tensor_type.elem_type for one in inferred.graph.value_info}
            assert theirs.items() <= ours.items()
            assert len(theirs) > 20


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("Cast", {"to": TensorProto.INT64}),
        ("Cast", {"to": TensorProto.INT32}),
        ("Cast", {"to": TensorProto.BOOL}),
        ("Greater", {}),
        ("LessOrEqual", {}),
        ("Equal", {}),
        ("ArgMax", {"axis": 0}),
        ("NonZero", {}),
    ],
)
def test_each_way_from_a_float_to_an_index_is_found(
    operator: str, attributes: dict[str, int]
) -> None:
    inputs = ["a", "a"] if operator in ("Greater", "LessOrEqual", "Equal") else ["a"]
    for kind, found in ((TensorProto.FLOAT, ["one"]), (TensorProto.INT64, [])):
        node = helper.make_node(operator, inputs, ["out"], "one", **attributes)
        value = helper.make_tensor_value_info("a", kind, [4])
        graph = helper.make_graph([node], "g", [value], [])
        assert float_indices(GraphProto.FromString(graph.SerializeToString())) == found


def test_what_a_graph_counts_in_floats_is_found() -> None:
    def graph(*nodes: onnx.NodeProto) -> GraphProto:
        value = helper.make_tensor_value_info("mask", TensorProto.INT64, [1, 4])
        made = helper.make_graph(list(nodes), "g", [value], [])
        return GraphProto.FromString(made.SerializeToString())

    cast = helper.make_node("Cast", ["mask"], ["float"], "float", to=ONNX_FLOAT)
    for operator in ("ReduceSum", "Abs", "Identity"):
        node = helper.make_node(operator, ["float"], ["count"], "count")
        assert whole_floats(graph(cast, node)) == ["count"] * (operator != "Identity")
    total = helper.make_node("ReduceSum", ["mask"], ["total"], "total")
    assert whole_floats(graph(total)) == []


def as_it_was_written_once(bundle: ModelBundle) -> ModelBundle:
    """Rewrites a bundle of MPNet so that the index of a distance is a float."""
    model = onnx.load(str(bundle.graph), load_external_data=False)
    nodes = list(model.graph.node)
    (place,) = (n for n, one in enumerate(nodes) if one.name == "bias.buckets.index")
    inputs = [f"{name}.float" for name in nodes[place].input]
    casts = [
        helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT)
        for name in nodes[place].input
    ]
    add = helper.make_node("Add", inputs, ["index.float"])
    index = helper.make_node(
        "Cast", ["index.float"], ["bias.buckets.index"], "bias.buckets.index", to=TensorProto.INT64
    )
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *casts, add, index, *nodes[place + 1 :]])
    bundle.graph.write_bytes(model.SerializeToString())
    spec = {name: getattr(bundle, name) for name in ModelSpec.__struct_fields__}
    write_manifest(bundle.folder, bundle.name, ModelSpec(**spec))
    return ModelBundle.from_folder(bundle.folder, verify=True)


def add_mpnet(folder: Path) -> ModelBundle:
    return Registry(folder).add_model(str(GOLDEN / "families" / "mpnet"), progress=print)


def test_bfloat16_is_refused_for_a_graph_of_before_and_auto_takes_float32(tmp_path: Path) -> None:
    new = add_mpnet(tmp_path)
    chosen = resolve_replicas(EngineConfig(), BFLOAT16_HOST, new)
    assert chosen.configs[0].precision == "bfloat16"
    old = as_it_was_written_once(new)
    assert old.hash == new.hash
    chosen = resolve_replicas(EngineConfig(), BFLOAT16_HOST, old)
    assert chosen.configs[0].precision == "float32"
    assert "older Fletcher" in chosen.reason
    config = BackendConfig("openvino", "cpu", str(old.folder), precision="bfloat16", threads=1)
    with pytest.raises(BackendError, match=r"fletcher model add folder:mpnet --name mpnet") as info:
        openvino.load(config)
    assert info.value.allowed == ["float32"]


def test_adding_a_model_again_replaces_a_graph_of_before_and_keeps_its_ranges(
    tmp_path: Path,
) -> None:
    old = as_it_was_written_once(add_mpnet(tmp_path))
    cut = Cut(layers=old.num_layers, dims=old.dim, normalized=True)
    lowest = np.zeros(old.dim, np.float32)
    Registry(tmp_path).save_calibration(
        "mpnet", Calibration(5, {cut: Ranges.between(lowest, lowest + 1)})
    )
    assert float_indices(read_model(old.graph).graph)
    lines: list[str] = []
    again = Registry(tmp_path).add_model(str(GOLDEN / "families" / "mpnet"), progress=lines.append)
    assert any("written anew" in line for line in lines)
    assert again.hash == old.hash
    assert list(again.calibration.ranges) == [cut]
    assert float_indices(read_model(again.graph).graph) == []
    Registry(tmp_path).verify_model("mpnet")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mpnet.lock", "mpnet"]
    before = (again.folder / MANIFEST).stat().st_mtime_ns
    same = Registry(tmp_path).add_model(str(GOLDEN / "families" / "mpnet"), progress=print)
    assert (same.folder / MANIFEST).stat().st_mtime_ns == before
