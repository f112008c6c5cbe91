"""Which calls are let in."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from fletcher.errors import DrainingError, OverloadedError
from fletcher.serving.admission import Admission, RetryHints
from fletcher.serving.load_level import LoadMonitor, LoadSignals
from fletcher.telemetry.tracing import Telemetry

HINTS = RetryHints(overloaded_ms=1, severe_ms=2, draining_ms=3)


class Door:
    """An admission of two streams, signals that a test sets, and a model."""

    def __init__(self) -> None:
        self.signals = LoadSignals()
        self.refusal: OverloadedError | None = None
        telemetry = Telemetry()
        load = LoadMonitor(lambda: self.signals, telemetry, lambda _: None)
        self.admission = Admission(2, load, telemetry)
        self.admission.hints = HINTS
        self.embedder: Any = SimpleNamespace(check_workers=self._check)

    def _check(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def admit(self, *, bulk: bool = False) -> Any:
        return self.admission.admit(self.embedder, bulk=bulk)


def test_streams_are_limited_and_places_come_back() -> None:
    door = Door()
    with door.admit(), door.admit():
        assert (door.admission.num_streams, door.admission.stream_share) == (2, 1.0)
        with pytest.raises(OverloadedError, match="max_streams") as caught, door.admit():
            pass
        assert caught.value.retry_after_ms == 1
        assert not door.admission.wait_idle(0.01)
    assert door.admission.wait_idle(0)
    with pytest.raises(ValueError, match="mine"), door.admit():
        raise ValueError("mine")
    assert door.admission.num_streams == 0


def test_bulk_work_alone_is_refused_under_severe_load() -> None:
    door = Door()
    door.signals = LoadSignals(streams=1.0)
    with door.admit():
        pass
    with pytest.raises(OverloadedError, match="of the streams are open") as caught:
        door.admit(bulk=True).__enter__()
    assert caught.value.retry_after_ms == 2


def test_a_model_without_workers_is_refused_and_takes_no_place() -> None:
    door = Door()
    door.refusal = OverloadedError("no workers")
    with pytest.raises(OverloadedError, match="no workers"):
        door.admit().__enter__()
    assert door.admission.num_streams == 0


def test_calls_that_send_nothing_are_limited_too() -> None:
    door = Door()
    with ExitStack() as calls:
        for _ in range(16):
            calls.enter_context(door.admission.begin_call())
        with pytest.raises(OverloadedError, match="16 calls"):
            calls.enter_context(door.admission.begin_call())
    with door.admission.begin_call():
        pass


def test_while_draining_nothing_new_is_let_in_and_the_last_to_leave_is_waited_for() -> None:
    door = Door()
    with door.admit():
        door.admission.draining.set()
        for refused in (door.admit, door.admission.begin_call):
            with pytest.raises(DrainingError) as caught:
                refused().__enter__()
            assert caught.value.retry_after_ms == 3
        with pytest.raises(DrainingError):
            door.admission.check_draining()
        waited: list[bool] = []
        thread = threading.Thread(target=lambda: waited.append(door.admission.wait_idle(30)))
        thread.start()
    thread.join(30)
    assert waited == [True]
