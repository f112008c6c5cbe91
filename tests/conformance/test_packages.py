"""Clients are packaged as their ecosystems expect, and have Fletcher's version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.conformance.drivers import ROOT, require_tool, run_tool

pytestmark = pytest.mark.timeout(1300)
CLIENTS = ROOT / "clients"


def versions() -> dict[str, str]:
    go = re.search(r'const Version = "(.*)"', (CLIENTS / "go" / "client.go").read_text())
    assert go is not None
    return {
        "go": go.group(1),
        "rust": _toml(CLIENTS / "rust" / "Cargo.toml")["package"]["version"],
    }


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
    run_tool("rust", ["cargo", *argv, "--locked", "--quiet"])
