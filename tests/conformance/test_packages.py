"""Clients are packaged as their ecosystems expect, and have Fletcher's version."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

from fletcher.models.bundle.bundle import ModelBundle
from tests.conformance.drivers import ROOT, install_js, require_tool, run_maven, run_tool
from tests.integration.processes import Place, serving

pytestmark = pytest.mark.timeout(1300)
CLIENTS = ROOT / "clients"


def versions() -> dict[str, str]:
    go = re.search(r'const Version = "(.*)"', (CLIENTS / "go" / "client.go").read_text())
    assert go is not None
    return {
        "go": go.group(1),
        "rust": _toml(CLIENTS / "rust" / "Cargo.toml")["package"]["version"],
        "java": _java_version(),
        "js": json.loads((CLIENTS / "js" / "package.json").read_text())["version"],
    }


def _java_version() -> str:
    pom = (CLIENTS / "java" / "pom.xml").read_text()
    (version,) = re.findall(r"^  <version>(.*)</version>", pom, re.MULTILINE)
    source = CLIENTS / "java" / "src/main/java/longbowfletcher/FletcherClient.java"
    assert f'VERSION = "{version}"' in source.read_text()
    return str(version)


def _toml(path: Path) -> dict[str, dict[str, str]]:
    return tomllib.loads(path.read_text())


@pytest.mark.parametrize("language", versions())
def test_clients_have_the_version_of_fletcher(language: str) -> None:
    assert versions()[language] == _toml(ROOT / "pyproject.toml")["project"]["version"]


@pytest.mark.parametrize(
    "argv",
    [("test", "--doc"), ("package", "--allow-dirty", "--no-verify")],
    ids=lambda argv: argv[0],
)
def test_the_crate_and_the_examples_of_its_page(argv: tuple[str, ...]) -> None:
    require_tool("rust")
    run_tool("rust", ["cargo", *argv, "--quiet"])


def test_the_archive_of_maven_has_the_classes(tmp_path: Path) -> None:
    require_tool("java")
    run_maven(tmp_path, "package")
    (archive,) = tmp_path.glob("*.jar")
    with zipfile.ZipFile(archive) as files:
        names = files.namelist()
    assert "longbowfletcher/FletcherClient.class" in names
    assert not any("Conformance" in name for name in names)


def test_the_package_of_npm_has_all_files(tmp_path: Path) -> None:
    require_tool("js")
    told = subprocess.run(
        ["npm", "pack", "--dry-run", "--json", "--silent"],
        cwd=CLIENTS / "js", check=True, stdout=subprocess.PIPE, timeout=120,
    ).stdout  # fmt: skip
    (package,) = json.loads(told)
    sources = (CLIENTS / "js" / "src").iterdir()
    wanted = {"package.json", "README.md", *(f"src/{one.name}" for one in sources)}
    assert {one["path"] for one in package["files"]} == wanted


def test_the_example_of_the_page_for_javascript(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    require_tool("js")
    copy = install_js(tmp_path)
    (tmp_path / "models").symlink_to(tiny_bundle.folder.parent)
    place = Place(tmp_path, tmp_path / "vectors")
    example = (copy / "README.md").read_text().partition("```js\n")[2].partition("```")[0]
    with serving(place.argv()) as server:
        program = example.replace("grpc://127.0.0.1:8815", server.address)
        (copy / "example.mjs").write_text(program)
        subprocess.run(["node", copy / "example.mjs"], check=True, timeout=60)
