"""Time after which a Longbow does not lose rows that it acknowledged.

A Longbow acknowledges rows before it writes them to its log. Rows were lost up to 0.2 s after their
acknowledgement when its process was killed, on a machine with more work than cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# Ten times the longest time after which a loss was seen.
SETTLE_S = 2.0
_NUM_CALLS = 8


class Settling:
    """Waits until a Longbow has run for `SETTLE_S`. Thread-safe.

    A process that is stopped writes nothing, and time passes all the same. So the wait is divided
    by calls that only a running process answers.

    Args:
        call: Makes a short call to the Longbow. Raises FletcherError if it does not answer.
    """

    def __init__(
        self, call: Callable[[], object], *, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._call = call
        self._sleep = sleep
        self._is_calm = False  # whether nothing failed since the last wait

    @property
    def allowed_s(self) -> float:
        """Time that a wait may take before a call that stays open has to end."""
        return 2 * SETTLE_S

    def note_failure(self) -> None:
        """Note a call that may have left rows on their way."""
        self._is_calm = False

    def settle(self) -> None:
        """Wait, from now on. Raises FletcherError if the Longbow does not answer."""
        for _ in range(_NUM_CALLS):
            self._sleep(SETTLE_S / _NUM_CALLS)
            self._call()
        self._is_calm = True

    def settle_failures(self) -> None:
        """Wait as `settle`, unless nothing failed since the last wait."""
        if not self._is_calm:
            self.settle()
