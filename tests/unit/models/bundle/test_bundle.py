from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import ModelBundle

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tiny_bundle: ModelBundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "tiny"))


def edit(folder: Path, change: Edit) -> None:
    path = folder / "fletcher.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_copied_bundle_loads_as_the_same_model(tiny_bundle: ModelBundle, folder: Path) -> None:
    copied = ModelBundle.from_folder(folder, verify=True)
    assert copied.qualified_name == tiny_bundle.qualified_name == f"tiny@{tiny_bundle.hash}"
    assert (copied.dim, copied.max_length, copied.pooling, copied.normalize) == (
        32,
        32,
        "mean",
        True,
    )
    assert copied.prompts == {"query": "search the text: "}
    assert copied.graph == folder / "model.onnx"
    assert copied.tokenizer == folder / "tokenizer.json"
    with pytest.raises(AttributeError):
        copied.dim = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("format"), "format"),
        (lambda m: m.update(format=3), "`format` is 3, expected 1 to 2"),
        (lambda m: m.pop("pooling"), "no field `pooling`"),
        (
            lambda m: m.update(pooling="median"),
            "`pooling` is 'median', expected one of mean, cls, last_token",
        ),
        (
            lambda m: m.update(dim="32"),
            r"json: `dim` is '32', expected `int`; add the model",
        ),
        (lambda m: m.update(dim=True), "`dim` is True, expected `int`"),
        (lambda m: m.update(dim=0), "`dim` is 0, expected `int` >= 1"),
        (lambda m: m.update(dims=[64, 32]), "`dims`"),
        (lambda m: m.update(dims=[]), "`dims`"),
        (lambda m: m.update(layers=[3]), "`layers`"),
        (lambda m: m.update(inputs=["input_ids", "pixels"]), r"`inputs\[1\]` is 'pixels'"),
        (lambda m: m.update(prompts={"query": 1}), r"`prompts\[...\]` has a value"),
        (lambda m: m.update(default_prompt="absent"), "`default_prompt`"),
        (lambda m: m.update(name="../evil"), "`name`"),
        (lambda m: m.update(graph="../model.onnx"), "`graph`"),
        (lambda m: m.update(graph="/etc/hostname"), "`graph`"),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "`files`"),
        (lambda m: m["files"].update({"tokenizer.json": 3}), "tokenizer.json"),
        (lambda m: m["files"].pop("tokenizer.json"), "tokenizer.json"),
        (lambda m: m.update(colour="red"), "unknown field `colour`"),
        # What would change vectors without changing a file.
        (lambda m: m.update(max_length=16), "was changed"),
        (lambda m: m.update(normalize=False), "was changed"),
    ],
)
def test_odd_manifests_are_refused(folder: Path, change: Edit, message: str) -> None:
    edit(folder, change)
    with pytest.raises(ModelError, match=message):
        ModelBundle.from_folder(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": '])
def test_a_broken_manifest_is_refused(folder: Path, content: str) -> None:
    (folder / "fletcher.json").write_text(content)
    with pytest.raises(ModelError, match=r"fletcher\.json"):
        ModelBundle.from_folder(folder)


def test_a_missing_or_short_file_is_named_without_the_servers_path(folder: Path) -> None:
    weights = folder / "model.weights"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"^model\.weights has [\d,]+ bytes") as caught:
        ModelBundle.from_folder(folder)
    assert str(folder) not in caught.value.message
    weights.unlink()
    with pytest.raises(ModelError, match=r"^model\.weights is missing"):
        ModelBundle.from_folder(folder)


def test_a_flipped_bit_is_found_by_verify_alone(folder: Path) -> None:
    weights = folder / "model.weights"
    content = bytearray(weights.read_bytes())
    content[5000] ^= 1
    weights.write_bytes(content)
    ModelBundle.from_folder(folder)
    with pytest.raises(ModelError, match=r"^model\.weights has a wrong SHA-256"):
        ModelBundle.from_folder(folder, verify=True)


def test_a_link_out_of_the_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (folder / "tokenizer.json").rename(outside)
    (folder / "tokenizer.json").symlink_to(outside)
    with pytest.raises(ModelError, match=r"^tokenizer\.json leads out"):
        ModelBundle.from_folder(folder)
