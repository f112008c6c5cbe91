"""Steps that must happen, whatever error they raise at first."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 5.0


def insist(step: Callable[[], _Result], what: str) -> _Result:
    """Repeat a step until it raises no error, with growing pauses; return its result.

    For steps without which rows would be forgotten or a client would wait for ever. They fail only
    for want of memory, or because of a defect. The step must bear to be repeated. `what` names it
    in the log.
    """
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return step()
        except BaseException:  # also a panic of a Rust library
            with contextlib.suppress(BaseException):  # there may be no memory for the log, either
                log.exception("%s failed; trying again in %.2g s", what, pause_s)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
