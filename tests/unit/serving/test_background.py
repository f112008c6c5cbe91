"""Background tasks and their failures."""

from __future__ import annotations

import logging
import threading

import pytest

from fletcher.errors import InternalError, OverloadedError
from fletcher.serving.background import BackgroundTask


def test_work_runs_on_its_own_thread() -> None:
    threads: list[threading.Thread] = []
    failures: list[Exception] = []
    task = BackgroundTask("w", lambda: threads.append(threading.current_thread()), failures.append)
    task.join()
    task.wait()
    assert [one.name for one in threads] == ["w"]
    assert (task.error, failures) == (None, [])


@pytest.mark.parametrize(
    ("error", "expected", "raised"),
    [
        (OverloadedError("busy"), None, OverloadedError),
        (ValueError("secret"), None, InternalError),
        (ValueError("told"), (ValueError,), ValueError),
    ],
)
def test_a_failure_is_told_at_once_and_raised_by_join(
    error: Exception,
    expected: tuple[type[Exception], ...] | None,
    raised: type[Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise error

    failures: list[Exception] = []
    options = {} if expected is None else {"expected": expected}
    with caplog.at_level(logging.ERROR):
        task = BackgroundTask("w", fail, failures.append, **options)
        task.wait()
    assert failures == [task.error]
    with pytest.raises(raised) as caught:
        task.join()
    assert ("secret" in caplog.text) == (raised is InternalError)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("error", [None, KeyError("x"), SystemError()])
def test_a_call_waits_for_its_thread_whatever_fails(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    # gRPC ended the process when the thread wrote to a call that had ended.
    wait, errors, written = BackgroundTask.wait, [MemoryError(), RuntimeError()], []

    def failing(task: BackgroundTask) -> None:
        if errors:
            raise errors.pop()
        wait(task)

    monkeypatch.setattr(BackgroundTask, "wait", failing)
    go_on = threading.Event()

    def work() -> None:
        assert go_on.wait(30)
        written.append(True)

    def call() -> None:
        with BackgroundTask("writer", work, lambda _: None):
            go_on.set()
            if error is not None:
                raise error

    if error is None:
        call()
    else:
        with pytest.raises(type(error)):
            call()
    assert written
    assert not errors


def test_a_failure_that_cannot_be_logged_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The call ended well, without a summary.
    def failing(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fletcher.serving.background.log.exception", failing)
    told: list[Exception] = []
    task = BackgroundTask("w", failing, told.append)
    with pytest.raises(InternalError):
        task.join()
    assert told == [task.error]
