"""Drivers of the conformance cases: one program for each client."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Programs that build and run a client's driver.
TOOLS = {"python": "python3", "go": "go", "rust": "cargo", "js": "npm", "java": "mvn"}
# Cargo's own locks let several processes build in one folder.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
CARGO_TARGET = CACHE / "fletcher-rust"


class Driver:
    """A running driver. Answers one case at a time."""

    def __init__(self, argv: list[str]) -> None:
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def run(self, **case: Any) -> dict[str, Any]:
        """The outcome of a case."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the driver ended with {self._process.wait(30)}"
        return dict(json.loads(line))

    def start(self, **case: Any) -> threading.Thread:
        """Run a case on another thread, whose `outcome` has the outcome."""
        thread = _Case(self, case)
        thread.start()
        return thread

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class _Case(threading.Thread):
    def __init__(self, driver: Driver, case: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._driver = driver
        self._case = case
        self.outcome: dict[str, Any] = {}

    def run(self) -> None:
        self.outcome = self._driver.run(**self._case)


def require_tool(language: str) -> None:
    """Skip the test if the machine lacks the language's tools, or fail it with REQUIRE_CLIENTS."""
    if shutil.which(TOOLS[language]) is None:
        refuse = pytest.fail if os.environ.get("REQUIRE_CLIENTS") else pytest.skip
        refuse(f"{language}: {TOOLS[language]} is not installed")


def run_tool(language: str, argv: list[str]) -> None:
    """Run a language's tool in the folder of its client."""
    variables = {"CARGO_TARGET_DIR": str(CARGO_TARGET), "CARGO_PROFILE_DEV_DEBUG": "0"}
    folder = ROOT / "clients" / language
    subprocess.run(argv, cwd=folder, env={**os.environ, **variables}, check=True, timeout=1200)


@contextmanager
def running(language: str, folder: Path) -> Iterator[Driver]:
    """Builds a client's driver in `folder` and runs it."""
    require_tool(language)
    driver = Driver(_build(language, folder))
    try:
        yield driver
    finally:
        driver.close()


def _build(language: str, folder: Path) -> list[str]:
    """The command that runs a driver."""
    program = folder / "conformance"
    if language == "js":
        return ["node", str(install_js(folder) / "conformance.js")]
    if language == "python":
        return [sys.executable, "-m", "tests.conformance.python_driver"]
    if language == "java":
        return _build_java(folder)
    if language == "go":
        run_tool("go", ["go", "build", "-o", str(program), "./cmd/conformance"])
    else:
        run_tool("rust", ["cargo", "build", "--quiet", "--example", "conformance"])
        shutil.copy2(CARGO_TARGET / "debug" / "examples" / "conformance", program)
    return [str(program)]


def _build_java(folder: Path) -> list[str]:
    run_maven(
        folder,
        "test-compile",
        "dependency:build-classpath",
        f"-Dmdep.outputFile={folder / 'classpath'}",
    )
    jars = (folder / "classpath").read_text().strip()
    classes = f"{folder / 'classes'}:{folder / 'test-classes'}:{jars}"
    opens = "--add-opens=java.base/java.nio=ALL-UNNAMED"
    return ["java", opens, "-cp", classes, "longbowfletcher.Conformance"]


def run_maven(folder: Path, *arguments: str) -> None:
    """Run Maven, which builds in `folder`. Its repository takes one process at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "fletcher-maven.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_tool("java", ["mvn", "-q", "-B", f"-DbuildDirectory={folder}", *arguments])


def install_js(folder: Path) -> Path:
    """A copy of the JavaScript client in `folder`, with the packages that it needs."""
    client = ROOT / "clients" / "js"
    digest = hashlib.sha256((client / "package.json").read_bytes()).hexdigest()[:16]
    cached = CACHE / f"fletcher-js-{digest}"
    if not cached.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix="fletcher-js-", dir=CACHE))
        shutil.copy2(client / "package.json", new)
        argv = ["npm", "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--silent"]
        subprocess.run(argv, cwd=new, check=True, timeout=1200)
        try:
            new.rename(cached)
        except OSError:  # another process was faster
            shutil.rmtree(new)
    copy = folder / "js"
    shutil.copytree(client, copy, ignore=shutil.ignore_patterns("node_modules"))
    (copy / "node_modules").symlink_to(cached / "node_modules")
    return copy
