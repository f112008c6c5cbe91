"""Drivers of the conformance cases: one program for each client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Programs that build and run a client's driver.
TOOLS = {"python": "python3", "go": "go"}


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


@contextmanager
def running(language: str, folder: Path) -> Iterator[Driver]:
    """Builds a client's driver in `folder` and runs it.

    Skips the test if the machine lacks the language's tools.
    """
    if shutil.which(TOOLS[language]) is None:
        if os.environ.get("REQUIRE_CLIENTS"):
            pytest.fail(f"{language}: {TOOLS[language]} is not installed")
        pytest.skip(f"{language}: {TOOLS[language]} is not installed")
    driver = Driver(_build(language, folder))
    try:
        yield driver
    finally:
        driver.close()


def _build(language: str, folder: Path) -> list[str]:
    """The command that runs a driver."""
    if language == "python":
        return [sys.executable, "-m", "tests.conformance.python_driver"]
    program = folder / "conformance"
    subprocess.run(
        ["go", "build", "-o", str(program), "./cmd/conformance"],
        cwd=ROOT / "clients" / "go", check=True, timeout=600,
    )  # fmt: skip
    return [str(program)]
