"""A runtime's start and end in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

import fletcher
from fletcher.config.server import ServeConfig
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.runtime import Runtime


def test_a_start_that_fails_leaves_nothing_open(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    # The journal stayed locked after a model that is not installed.
    (tmp_path / "models").symlink_to(tiny_bundle.folder.parent)
    config = ServeConfig.from_options(
        port=0,
        home=tmp_path,
        model="absent",
        backend="null",
        store=(f"lance:{tmp_path / 'vectors'}",),
    )
    failing = Runtime(config)
    with pytest.raises(fletcher.UnknownModelError):
        failing.start()
    assert failing.wait(0)
    with Runtime(config.with_options(model=tiny_bundle.name)) as runtime:
        assert runtime.service.models.default.name == tiny_bundle.qualified_name
        assert runtime.address.startswith("grpc://127.0.0.1:")
    assert runtime.close()
