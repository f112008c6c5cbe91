"""Time after which a Longbow does not lose rows that it acknowledged.

A Longbow acknowledges rows before it writes them to its log. Rows were lost up to 0.2 s after their
acknowledgement when its process was killed, on a machine with more work than cores.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from fletcher.util.threads import start_thread

# Ten times the longest time after which a loss was seen.
CONFIRM_S = 2.0
_NUM_CALLS = 8


@dataclass(slots=True, eq=False)
class _Wait:
    # One more call than the time needs: the next one may be under way already.
    calls_left: int = _NUM_CALLS + 1
    done: Future[None] = field(default_factory=Future)


class RunningTime:
    """Measurement of the time for which a Longbow runs. Thread-safe.

    One thread measures it for all who wait.

    A process that is stopped writes nothing, and time passes all the same. So the time is divided
    by short calls that only a running process answers.

    Args:
        call: Makes a short call to the Longbow. Raises FletcherError if it does not answer.
    """

    def __init__(
        self, call: Callable[[], object], *, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._call = call
        self._sleep = sleep
        self._lock = threading.Lock()
        self._waits: list[_Wait] = []
        self._num_failures = 1  # rows of a process before this one may be on their way
        self._num_confirmed_failures = 0

    def start_wait(self) -> Future[None]:
        """Wait for `CONFIRM_S` from now on.

        The future ends then, or with the error of a call that the Longbow did not answer.

        Raises:
            OverloadedError: The thread cannot start.
        """
        wait = _Wait()
        with self._lock:
            if not self._waits:
                start_thread("longbow-running", self._run)
            self._waits.append(wait)
        return wait.done

    def note_failure(self) -> None:
        """Note a call that may have left rows on their way."""
        with self._lock:
            self._num_failures += 1

    def wait_after_failure(self) -> None:
        """Wait for `CONFIRM_S`, unless nothing failed since the last such wait.

        Raises:
            FletcherError: The Longbow does not answer.
        """
        num_failures = self._num_failures
        if self._num_confirmed_failures < num_failures:
            self.start_wait().result()
            self._num_confirmed_failures = num_failures

    def _run(self) -> None:
        while True:
            error: BaseException | None = None
            try:
                self._sleep(CONFIRM_S / _NUM_CALLS)
                self._call()
            except BaseException as caught:  # noqa: BLE001 - all waits end with it
                error = caught
            with self._lock:
                for wait in self._waits:
                    wait.calls_left -= 1
                ended = [one for one in self._waits if error is not None or not one.calls_left]
                self._waits = [one for one in self._waits if one not in ended]
                is_last = not self._waits
            for wait in ended:
                if error is None:
                    wait.done.set_result(None)
                else:
                    wait.done.set_exception(error)
            if is_last:  # a later wait starts another thread
                return
