"""Work of a call on a second thread."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Self

from fletcher.errors import FletcherError, InternalError
from fletcher.util.insist import insist
from fletcher.util.threads import start_thread

log = logging.getLogger(__name__)


class BackgroundTask:
    """Work of a call on a second thread, which starts immediately.

    The end of a `with` statement waits for the thread, whatever fails: gRPC ends the process if a
    thread writes to a call that has ended.

    Args:
        name: Name of the thread.
        work: Runs on the thread.
        on_failure: Called on the thread with the error that `join` raises, until it raises
            nothing itself.
        expected: Errors that `join` raises as they are. Any other error is logged and becomes an
            InternalError.

    Raises:
        OverloadedError: The thread cannot start.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        on_failure: Callable[[Exception], None],
        expected: tuple[type[Exception], ...] = (FletcherError,),
    ) -> None:
        self.error: Exception | None = None
        self._work = work
        self._on_failure = on_failure
        self._expected = expected
        self._name = name
        self._thread = start_thread(name, self._run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        insist(self.wait, self._name)

    def wait(self) -> None:
        """Wait for the thread's end; its error, if any, is then in `error`."""
        self._thread.join()

    def join(self) -> None:
        """Wait for the thread's end, and raise its error."""
        self.wait()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self._work()
        except self._expected as error:
            self.error = error
        except BaseException:  # also a panic of a Rust library
            self.error = InternalError("the server failed on this call; its log has more")
            with contextlib.suppress(BaseException):  # there may be no memory for the log, either
                log.exception("%s failed", self._name)
        if self.error is not None:
            insist(functools.partial(self._on_failure, self.error), self._name)
