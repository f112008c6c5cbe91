"""ONNX files that Fletcher writes are those of the format's own library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import Descriptor

from fletcher.models.onnx.graph import GRAPH_FILE, MICROSOFT, GraphBuilder, read_model
from fletcher.models.onnx.onnx_pb2 import DESCRIPTOR


def write_graph(folder: Path) -> Path:
    """A graph with each kind of constant, attribute and dimension."""
    with GraphBuilder(folder, "every") as graph:
        value = graph.input("value", np.float32, ("batch", 16))
        graph.constant("shape", [0, -1])
        large = graph.constant("large", np.arange(512, dtype=np.float16))
        graph.node("Fused", (value, "", large), "fused", domain=MICROSOFT, epsilon=0.5, heads=0)
        graph.nodes("Split", ("fused",), ("left", "right"), axis=-1, mode="é", perm=(1, 0))
        graph.output("left", np.float32, ("batch", 8))
        graph.save()
    return folder / GRAPH_FILE


def test_the_onnx_library_writes_the_same_bytes(tmp_path: Path) -> None:
    path = write_graph(tmp_path)
    model = onnx.load(path, load_external_data=False)
    assert model.SerializeToString(deterministic=True) == path.read_bytes()
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 20), (MICROSOFT, 1)]
    fused, split = model.graph.node
    assert (list(fused.input), list(split.output)) == (["value", "", "large"], ["left", "right"])
    helper = onnx.helper.get_attribute_value
    attributes = {one.name: helper(one) for node in (fused, split) for one in node.attribute}
    assert attributes == {
        "epsilon": 0.5,
        "heads": 0,
        "axis": -1,
        "mode": "é".encode(),
        "perm": [1, 0],
    }
    onnx.load_external_data_for_model(model, str(tmp_path))
    shape, large = map(onnx.numpy_helper.to_array, model.graph.initializer)
    assert shape.tolist() == [0, -1]
    assert np.array_equal(large, np.arange(512, dtype=np.float16))


def test_every_field_has_the_number_and_type_of_onnx() -> None:
    def fields(message: Descriptor) -> dict[str, tuple[object, ...]]:
        kinds = {
            one.name: (one.number, one.type, one.label, one.message_type and one.message_type.name)
            for one in message.fields
        }
        nested = message.nested_types
        return kinds | {
            f"{one.name}.{key}": value for one in nested for key, value in fields(one).items()
        }

    theirs = onnx.ModelProto.DESCRIPTOR.file
    for name, message in DESCRIPTOR.message_types_by_name.items():
        assert fields(message).items() <= fields(theirs.message_types_by_name[name]).items()
        for enum in message.enum_types:
            values = theirs.message_types_by_name[name].enum_types_by_name[enum.name].values_by_name
            assert {one.name: one.number for one in enum.values}.items() <= {
                key: one.number for key, one in values.items()
            }.items()


@pytest.mark.parametrize("order", [("onnx", "fletcher"), ("fletcher", "onnx")])
def test_the_onnx_library_and_the_schema_load_in_one_process(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    imports = {
        "onnx": "import onnx",
        "fletcher": "from fletcher.models.onnx.graph import read_model",
    }
    code = "\n".join(
        [
            *(imports[one] for one in order),
            "from pathlib import Path; import sys",
            "path = Path(sys.argv[1])",
            "assert read_model(path).graph.name == onnx.load(path).graph.name == 'every'",
        ]
    )
    subprocess.run([sys.executable, "-c", code, str(write_graph(tmp_path))], check=True)


@pytest.mark.parametrize("content", [b"", b"\x0a\x02no", b"not protobuf", b"\x08\x09"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / GRAPH_FILE
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"graph|pars"):
        read_model(path)
