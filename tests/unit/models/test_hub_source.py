"""The hub, by its real client against a stand-in; in processes of their own, since the client reads
its environment when it is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from fletcher.models.sources import hub as hub_source

from .conftest import GOLDEN, EditCheckpoint
from .hub_server import COMMIT, REPOSITORY, HubServer, serve


@pytest.fixture
def hub(checkpoint: EditCheckpoint) -> Iterator[HubServer]:
    folder = checkpoint()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_custom.py").write_text("raise SystemExit('this was run')")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\nA model.\n")
    with serve(HubServer(folder)) as running:
        yield running


def add(hub: HubServer, home: Path, source: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys, fletcher.cli; sys.exit(fletcher.cli.main())"]
    environ = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "FLETCHER_HOME": str(home)}
    environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [*command, "model", "add", source, "--json"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_model_comes_from_the_hub_and_stays(
    hub: HubServer, tmp_path: Path, tiny_bundle: ModelBundle
) -> None:
    done = add(hub, tmp_path, f"hub:{REPOSITORY}@v1")
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout)
    assert added["hash"] == tiny_bundle.hash
    assert added["source"] == f"hub:{REPOSITORY}@{COMMIT}"
    assert added["licence"] == "mit"
    asked = {path.rpartition("/")[2] for path in hub.requests}
    assert "model.safetensors" in asked
    assert not asked & {"pytorch_model.bin", "modeling_custom.py"}
    # The bundle needs no hub any more, and nothing of the download is left.
    Registry(tmp_path / "models").verify_model("tiny")
    left = [one.name for one in (tmp_path / "models").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == ["tiny"]


@pytest.mark.parametrize(
    ("name", "others", "wanted"),
    [
        ("pytorch_model.bin", [], True),
        ("pytorch_model.bin", ["model.safetensors"], False),
        ("pytorch_model.bin", ["2_Dense/model.safetensors"], True),
        ("2_Dense/pytorch_model.bin", ["model-00001-of-00002.safetensors"], True),
        ("pytorch_model-00001-of-00002.bin", ["model.safetensors.index.json"], False),
        ("sentence_xlm-roberta_config.json", [], True),
        ("0_Transformer/added_tokens.json", [], True),
        ("special_tokens_map.json", [], True),
        ("adapter_config.json", [], True),
        ("modeling_custom.py", [], False),
        ("training_args.bin", [], False),
    ],
)
def test_files_that_define_vectors_are_downloaded(
    name: str, others: list[str], wanted: bool
) -> None:
    assert hub_source._is_wanted(name, {name, *others}) is wanted


@pytest.mark.parametrize(
    "checkpoint",
    ["families/distilbert", "outputs/colbert", "outputs/pylate", "outputs/splade"],
)
def test_a_folder_and_the_hub_give_the_same_bundle(checkpoint: str, tmp_path: Path) -> None:
    local = Registry(tmp_path / "local").add_model(
        str(GOLDEN / checkpoint), name="tiny", progress=print
    )
    with serve(HubServer(GOLDEN / checkpoint)) as running:
        done = add(running, tmp_path, f"hub:{REPOSITORY}")
    assert done.returncode == 0, done.stderr
    assert _content(tmp_path / "models" / "tiny") == _content(local.folder)


def test_modules_in_separate_folders_are_downloaded(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "outputs" / "splade", folder)
    listed = json.loads((folder / "modules.json").read_text())
    listed[0]["path"] = "0_MLMTransformer"
    (folder / "modules.json").write_text(json.dumps(listed))
    top = {"modules.json", "config_sentence_transformers.json"}
    (folder / "0_MLMTransformer").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file() and path.name not in top]:
        path.rename(folder / "0_MLMTransformer" / path.name)
    with serve(HubServer(folder)) as running:
        done = add(running, tmp_path, f"hub:{REPOSITORY}")
    assert done.returncode == 0, done.stderr
    assert Registry(tmp_path / "models").get_model("tiny").output == "sparse"


def _content(bundle: Path) -> dict[str, object]:
    """All files of a bundle, without what says where it came from."""
    files = {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in bundle.rglob("*")
        if path.is_file()
    }
    manifest = json.loads(files.pop("fletcher.json"))
    assert manifest.pop("source")
    return {**files, "fletcher.json": manifest}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_with_another_checksum_is_refused(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.damage = name
    done = add(hub, tmp_path, f"hub:{REPOSITORY}")
    assert done.returncode == 1
    assert f"{name} has another checksum" in done.stderr
    assert Registry(tmp_path / "models").names() == []
    # What was whole is kept: only the damaged file is asked for again.
    hub.damage = ""
    hub.requests.clear()
    assert add(hub, tmp_path, f"hub:{REPOSITORY}").returncode == 0
    fetched = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert name in fetched
    assert "README.md" not in fetched


def test_a_repository_that_is_not_there_is_one_line(hub: HubServer, tmp_path: Path) -> None:
    done = add(hub, tmp_path, "hub:org/absent")
    assert done.returncode == 1
    assert "hub:org/absent could not be downloaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_client_the_remedy_is_a_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"pip install 'longbow-fletcher\[hub\]'"):
        Registry(tmp_path).add_model("hub:org/name", progress=print)
