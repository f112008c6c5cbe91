"""Size of the next batch window: about a second at the measured rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# How many times larger a batch window may become under pressure. At this size, only a third of the
# padding is left (docs/lab-book.md).
_GROWTH = 4
# Longest batch window, by the measured rate. A text waits for its own window and for those that
# take turns with it.
_LONGEST_S = 1.0
# Least share of the usual tokens. With 8 instead of 64 runs a window, the corpus takes 1.1% more
# padded tokens.
_SMALLEST = 1 / 8
# Runs in a usual window (`model_loader`).
_RUNS = 64


@dataclass(frozen=True, slots=True)
class WindowSize:
    """Size of batch windows.

    Attributes:
        tokens: Usual number of tokens of a window.
        rate: Returns the tokens that the replicas compute in a second; 0 if that is not measured.
        under_pressure: Returns whether so much work waits that bulk windows should be larger.
    """

    tokens: int
    rate: Callable[[], float]
    under_pressure: Callable[[], bool]

    @property
    def one_run(self) -> int:
        """Tokens of about one run."""
        return self.tokens // _RUNS

    def usual(self) -> int:
        """Returns the tokens of a window while no pressure makes windows larger."""
        return self._bounded(self.tokens)

    def next_bulk(self, waiting: int) -> int:
        """Returns the tokens of the next bulk window; `waiting` tokens wait."""
        if not self.under_pressure():
            return self.usual()
        # Half of the waiting tokens: the other half is the next window, while the memory of this
        # one is released.
        return self._bounded(min(max(waiting // 2, self.tokens), _GROWTH * self.tokens))

    def _bounded(self, most: int) -> int:
        rate = self.rate()
        if not rate:
            return most
        return min(most, max(math.ceil(self.tokens * _SMALLEST), int(rate * _LONGEST_S)))
