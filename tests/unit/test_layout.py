"""How the house is kept: where engines are imported, how large modules are, what is shipped.

The direction of imports inside Fletcher is import-linter's, see `.importlinter`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fletcher"

# Which modules may import a third-party engine: a full stop at the end allows a package's modules.
ENGINES = {
    "pyarrow.flight": (
        "fletcher.flight.",
        "fletcher.net.",
        "fletcher.client.",
        "fletcher.stores.",
        "fletcher.storeserver.",
    ),
    "onnxruntime": ("fletcher.inference.onnxruntime", "fletcher.inference.devices"),
    "openvino": ("fletcher.inference.openvino", "fletcher.inference.devices"),
    "tokenizers": ("fletcher.tokenization.tokenizer",),
    "lmdb": ("fletcher.pipeline.disk_cache",),
    "lancedb": ("fletcher.stores.", "fletcher.storeserver."),
    "opentelemetry": ("fletcher.telemetry.tracing",),
    "google.protobuf": (
        "fletcher.flight.commands",
        "fletcher.models.onnx.graph",
        "fletcher.stores.lance_repair",
    ),
    "huggingface_hub": ("fletcher.models.sources.hub",),
    "onnx": (),
    "torch": (),
}
# Modules aim at 400 lines; one beyond this holds more than one noun.
MAX_LINES = 500


def _module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {
    _module(path): path for path in sorted(PACKAGE.rglob("*.py")) if not path.stem.endswith("_pb2")
}


def _imports(path: Path) -> set[str]:
    """Full names of everything that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            names.add(node.args[0].value)
    return names


def _allowed(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or (room.endswith(".") and module.startswith(room)) for room in rooms)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_imported_in_its_own_rooms_only(engine: str) -> None:
    strangers = {
        module
        for module, path in MODULES.items()
        if any(name == engine or name.startswith(f"{engine}.") for name in _imports(path))
        and not _allowed(module, ENGINES[engine])
    }
    assert strangers == set()


def test_the_import_finder_sees_every_way_to_import(tmp_path: Path) -> None:
    code = (
        "import a.b as c\nfrom d import e\nfrom . import f\n"
        "def late():\n    import g\n    import importlib\n    importlib.import_module('h.i')\n"
    )
    path = tmp_path / "module.py"
    path.write_text(code)
    assert _imports(path) == {"a.b", "d", "d.e", "g", "importlib", "h.i"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_stays_readable(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= MAX_LINES


def test_every_module_says_what_it_is() -> None:
    silent = {
        module
        for module, path in MODULES.items()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    }
    assert silent == set()


def test_importing_fletcher_loads_no_engine() -> None:
    code = "import sys, fletcher; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) & {*ENGINES, "pyarrow", "numpy"} == set()


def test_extras_never_install_both_builds_of_onnxruntime() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    of = {
        name: [re.split(r"[\[<>=~!;, ]", requirement)[0] for requirement in requirements]
        for name, requirements in extras.items()
    }
    holders = {
        build: {name for name, packages in of.items() if build in packages}
        for build in ("onnxruntime", "onnxruntime-gpu")
    }
    assert holders == {"onnxruntime": {"cpu"}, "onnxruntime-gpu": {"gpu"}}


def test_every_dependency_is_pinned_and_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        re.split(r"[\[<>=~!;, ]", requirement)[0]
        for requirement in project["dependencies"]
        + [one for name in extras if name != "bench" for one in extras[name]]
    }
    pinned = {line.partition("==")[0] for line in _constraints()}
    explained = set(re.findall(r"^\| `([^`]+)`", (ROOT / "docs/dependencies.md").read_text(), re.M))
    assert {_canonical(name) for name in wanted} - {_canonical(name) for name in pinned} == set()
    assert wanted - explained == set()
    assert explained - wanted - {one.partition(">")[0] for one in extras["bench"]} == set()


def test_constraints_carry_versions_and_no_address() -> None:
    for line in _constraints():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+", line)


def test_the_shipped_sample_is_small_varied_and_about_go_too() -> None:
    path = ROOT / "examples/data/debian-sample.parquet"
    sample = pq.read_table(path)
    assert sample.column_names == ["package", "title", "body"]
    assert sample.num_rows == len(pc.unique(sample["package"])) == len(pc.unique(sample["body"]))
    assert sample.num_rows == 2000
    assert path.stat().st_size < 500_000
    packages = set(sample["package"].to_pylist())
    assert {"gnugo", "qgo", "leela-zero", "gnuchess", "vim", "gimp"} - packages == set()


def _constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
