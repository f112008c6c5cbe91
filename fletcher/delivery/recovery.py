"""Recovery of datasets whose journals have rows to send, at a server's start."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from fletcher.delivery.journal.root import JournalSpace, survey_journals
from fletcher.util.backoff import Backoff
from fletcher.util.insist import insist
from fletcher.util.threads import start_thread

log = logging.getLogger(__name__)

# The name of a store and the name of a dataset.
DatasetPlace = tuple[str, str]


class Recovery:
    """Recovers datasets, and tries again later where that fails.

    Args:
        recover_dataset: Callback that makes a dataset's sink, and returns its number of rows to
            send.
        retry: Lengths of the pauses between attempts.
    """

    def __init__(self, recover_dataset: Callable[[DatasetPlace], int], retry: Backoff) -> None:
        self._recover_dataset = recover_dataset
        self._retry = retry
        self._closed = threading.Event()

    def start(self, places: list[DatasetPlace]) -> int:
        """Recover datasets; return their number of rows to send. Never raises.

        A thread goes on with datasets whose journal cannot be read now.
        """
        num_rows, failed = self._recover_all(places)
        if failed:
            insist(partial(start_thread, "recovery", partial(self._go_on, failed)), "recovery")
        return num_rows

    def close(self) -> None:
        self._closed.set()

    def _go_on(self, places: list[DatasetPlace]) -> None:
        num_attempts = 0
        while places:
            num_attempts += 1
            if self._closed.wait(self._retry.delay_s(num_attempts, 1.0)):
                return
            _, places = self._recover_all(places)

    def _recover_all(self, places: list[DatasetPlace]) -> tuple[int, list[DatasetPlace]]:
        num_rows = 0
        failed: list[DatasetPlace] = []
        for place in places:
            try:
                num_rows += self._recover_dataset(place)
            except BaseException:
                failed.append(place)
                with contextlib.suppress(BaseException):
                    text = "journal: rows of `%s` cannot be read now; trying again"
                    log.exception(text, place[1])
        return num_rows, failed


def places_with_rows(
    root: Path, store_names: Mapping[str, str], space: JournalSpace | None
) -> list[DatasetPlace]:
    """Datasets whose journals under `root` may have rows to send.

    A dataset without such rows costs nothing: a sink takes milliseconds and a thread.
    `store_names` has the name of each store by the name of its folder. The sizes of all rejected
    groups are counted in `space`.
    """
    places = []
    for one in survey_journals(root):
        if space is not None:
            space.add_bytes(one.rejected_bytes)
        if one.waits and one.store in store_names:
            places.append((store_names[one.store], one.dataset))
        elif one.waits:
            log.error("journal: %s has rows for an unknown store; left alone", one.folder)
    return places
