"""Rules of the layout: imports of engines, sizes, names, and what is shipped.

The direction of imports inside Fletcher is import-linter's, see `.importlinter`. The rules about
names are explained in CONTRIBUTING.md and docs/glossary.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.unit import code_shape
from tests.unit.code_shape import ROOT

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
    "opentelemetry": ("fletcher.telemetry.",),
    "google.protobuf": (
        "fletcher.flight.commands",
        "fletcher.models.onnx.graph",
        "fletcher.stores.lance.repair",
    ),
    "huggingface_hub": ("fletcher.models.sources.hub", "fletcher.readers.object_stores"),
    "onnx": (),
    "torch": (),
}
MAX_LINES = 400
MAX_ARGUMENTS = 6
# A verb alone, as a method's name in more classes than this, does not tell what it acts on.
MAX_CLASSES_PER_VERB = 3
# Names that classes with the same role share.
LIFECYCLE = {"start", "stop", "close", "drain", "cancel", "abort"}
# Names of one word that are nouns.
NOUNS = {"statistics", "snapshot"}
# Words of a former private language, see docs/glossary.md: everywhere, or in one folder of the
# package where the word meant something else than it does in English.
BANNED_WORDS = {
    *("lane", "lanes", "outbox", "crew", "shelf", "hurry", "lend", "lent", "unsent", "pace"),
    *("crowded", "race", "route"),
}
BANNED_WORDS_BY_FOLDER = {
    "delivery": {"known", "screen", "turn", "turns"},
    "pipeline": {"piece", "pieces", "turn", "turns"},
    "tuning": {"probe", "turn", "turns"},
    "workers": {"slot", "slots", "turn", "turns"},
}

MODULES = code_shape.modules()
OTHER_CODE = {
    module: path
    for folder in ("benchmarks", "examples")
    for module, path in code_shape.modules(ROOT / folder).items()
}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
CLASSES = [shape for module, tree in TREES.items() for shape in code_shape.classes(module, tree)]


@cache
def _imports(path: Path) -> set[str]:
    """Full names of all imports of a module, at any depth."""
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


def _allowed(module: str, places: tuple[str, ...]) -> bool:
    return any(module == one or (one.endswith(".") and module.startswith(one)) for one in places)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_imported_in_few_modules(engine: str) -> None:
    others = {
        module
        for module, path in MODULES.items()
        if any(name == engine or name.startswith(f"{engine}.") for name in _imports(path))
        and not _allowed(module, ENGINES[engine])
    }
    assert others == set()


def test_the_import_finder_sees_every_way_to_import(tmp_path: Path) -> None:
    code = (
        "import a.b as c\nfrom d import e\nfrom . import f\n"
        "def late():\n    import g\n    import importlib\n    importlib.import_module('h.i')\n"
    )
    path = tmp_path / "module.py"
    path.write_text(code)
    assert _imports(path) == {"a.b", "d", "d.e", "g", "importlib", "h.i"}


def test_modules_stay_readable() -> None:
    long = {
        module
        for module, path in (MODULES | OTHER_CODE).items()
        if len(path.read_text().splitlines()) > MAX_LINES
    }
    assert long == set()


def test_public_class_names_are_unique() -> None:
    public = [(shape.name, shape.module) for shape in CLASSES if shape.is_public]
    names = Counter(name for name, _ in public)
    assert [one for one in public if names[one[0]] > 1] == []


def test_constructors_take_few_arguments() -> None:
    wide = {
        shape.name
        for shape in CLASSES
        if "__init__" in shape.methods
        and code_shape.num_arguments(shape.methods["__init__"]) > MAX_ARGUMENTS
    }
    assert wide == set()


def test_method_names_say_their_object() -> None:
    common = {
        verb: sorted(classes)
        for verb, classes in code_shape.verb_definers(CLASSES).items()
        if len(classes) > MAX_CLASSES_PER_VERB and verb not in LIFECYCLE | NOUNS
    }
    assert common == {}


def test_banned_words_stay_out() -> None:
    found = {
        f"{module}: {name}"
        for module, tree in TREES.items()
        for name in {*code_shape.defined_names(tree), module.rpartition(".")[2]}
        if code_shape.words(name) & _banned_words(module)
    }
    assert found == set()


def test_the_rules_find_violations() -> None:
    code = (
        "class Store(Protocol):\n    def get(self): ...\n    def put(self): ...\n"
        "class Lance:\n    get = 1\n    def put(self): ...\n"
        "class Base:\n    def put(self): ...\n"
        "class Child(Base):\n    def put(self): ...\n    def put_row(self): ...\n"
        "class Wide:\n    def __init__(self, a, /, b, *, c): self.the_outBox = a\n"
        "class Thing:\n    @property\n    def put(self): ...\n"
    )
    tree = ast.parse(code)
    shapes = list(code_shape.classes("m", tree))
    assert code_shape.verb_definers(shapes) == {
        "get": {"m.Store"},
        "put": {"m.Store", "m.Base"},
    }
    wide = next(shape for shape in shapes if shape.name == "Wide")
    assert code_shape.num_arguments(wide.methods["__init__"]) == 3
    assert "the_outBox" in code_shape.defined_names(tree)
    assert code_shape.words("the_outBox") == {"the", "out", "box"}
    assert code_shape.words("FlightHTTPServer_v1") == {"flight", "http", "server", "v"}


def test_every_module_has_a_docstring() -> None:
    without = {
        module
        for module, path in MODULES.items()
        if path.read_text().strip() and not ast.get_docstring(TREES[module])
    }
    assert without == set()


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


def _banned_words(module: str) -> set[str]:
    folder = module.split(".")[1] if "." in module else ""
    return BANNED_WORDS | BANNED_WORDS_BY_FOLDER.get(folder, set())


def _constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
