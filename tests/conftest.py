"""Fixtures for all tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from fletcher.config.server import fletcher_home
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import DEFAULT_MODEL, Registry

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start slow tests first, so that none runs alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def default_bundle() -> ModelBundle:
    """The real default model, downloaded once into FLETCHER_HOME for all processes and runs."""
    return Registry(fletcher_home() / "models").ensure_model(DEFAULT_MODEL, print)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Two layers of random weights, dim 32, max_length 32: mean pooling, normalised."""
    registry = Registry(tmp_path_factory.mktemp("models"))
    return registry.add_model(str(GOLDEN / "tiny"), progress=print)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Restores logging, which commands configure for a whole process."""
    root, own = logging.getLogger(), logging.getLogger("fletcher")
    handlers, levels = root.handlers[:], (root.level, own.level)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


@pytest.fixture(autouse=True)
def quick_confirmation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Confirm a Longbow's rows at once in this process: its double loses them on request only."""
    for module in ("running_time", "longbow_writer"):
        monkeypatch.setattr(f"fletcher.stores.flight.{module}.CONFIRM_S", 0.01)
