"""Closing of objects: at the end of a `with` statement, and after a failure."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

log = logging.getLogger(__name__)


class Closing(ABC):
    """An object with a method `close` that is called at the end of a `with` statement."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close_for_good(close: Callable[[], None], what: str) -> None:
    """Close an object that nobody holds afterwards. Never raises.

    A failed attempt is repeated once: an object that stays open would keep its lock. `close` does
    nothing for a closed object. `what` names the object in the log.
    """
    for _ in range(2):
        try:
            close()
        except BaseException:
            with contextlib.suppress(BaseException):  # there may be no memory for the log, either
                log.exception("%s cannot be closed", what)
        else:
            return
