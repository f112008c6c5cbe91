"""The integration tests' servers, for tests that break them, and a launcher of processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.launching import Forking, Launcher
from tests.integration.conftest import server, start_server, tiny_home

__all__ = ["launcher", "server", "start_server", "tiny_home"]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    """Starts processes that a test kills."""
    with Forking() as launcher:
        yield launcher
