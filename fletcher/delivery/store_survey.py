"""Numbers of the datasets of stores that index rows late, for `stats`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from fletcher.errors import OverloadedError
from fletcher.stores.base import DatasetInfo, Store
from fletcher.stores.longbow_trouble import index_trouble
from fletcher.util.threads import start_thread

log = logging.getLogger(__name__)

# Time between two questions, in which a working index grows.
_EVERY_S = 10.0
# Longest time that a caller waits for the answer to its question. It then gets the answer before.
_WAIT_S = 3.0


class StoreSurvey:
    """Numbers of the datasets of one store. Thread-safe.

    The store is asked on a second thread, at most every `every_s`, and only when somebody asks
    here. Stores that index rows when they store them are not asked.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        *,
        every_s: float = _EVERY_S,
        wait_s: float = _WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._store = store
        self._every_s = every_s
        self._wait_s = wait_s
        self._clock = clock
        self._lock = threading.Lock()
        self._next_at = 0.0
        self._done = threading.Event()
        self._done.set()
        self._last: dict[str, DatasetInfo] = {}
        self._found: dict[str, dict[str, Any]] = {}

    def statistics(self) -> dict[str, dict[str, Any]]:
        """`rows`, `indexed`, `bytes` and `trouble` by dataset; None for what is unknown."""
        if self._start():
            self._done.wait(self._wait_s)
        return self._found

    def _start(self) -> bool:
        """Whether a question is due, which then begins."""
        with self._lock:
            if not self._done.is_set() or self._clock() < self._next_at:
                return False
            self._done.clear()
            try:
                start_thread("store survey", self._ask)
            except OverloadedError:
                self._done.set()
                return False
            return True

    def _ask(self) -> None:
        try:
            if self._store.capabilities.index_lags:
                self._note({info.name: info for info in self._store.datasets()})
        except BaseException as error:  # noqa: BLE001 - the breaker reports the store's failures
            log.debug("store %s: its datasets cannot be listed: %s", self._name, error)
        finally:
            self._next_at = self._clock() + self._every_s
            self._done.set()

    def _note(self, now: dict[str, DatasetInfo]) -> None:
        found = {}
        for name, info in now.items():
            trouble = index_trouble(self._last.get(name), info)
            if trouble and trouble != self._found.get(name, {}).get("trouble"):
                log.warning(
                    "store %s: dataset `%s`: %s of %s rows are indexed: %s",
                    *(self._name, name, info.num_indexed, info.num_rows, trouble),
                )
            found[name] = {
                "rows": info.num_rows,
                "indexed": info.num_indexed,
                "bytes": info.num_bytes,
                "trouble": trouble,
            }
        self._last, self._found = now, found
