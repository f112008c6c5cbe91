"""Steps that must happen, whatever fails."""

from __future__ import annotations

import pytest

from fletcher.util import insist as module
from fletcher.util.insist import insist


class Panic(BaseException):
    """As a panic of a Rust library, which is no Exception."""


def test_a_step_is_repeated_also_if_its_failure_cannot_be_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors: list[BaseException] = [MemoryError(), Panic(), SystemError()]

    def step() -> str:
        if errors:
            raise errors.pop()
        return "done"

    def failing(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(module.log, "exception", failing)
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.0)
    assert insist(step, "a step") == "done"
