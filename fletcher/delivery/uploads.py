"""The uploads of a server: those in progress, and those that are still remembered."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from fletcher.delivery.upload import Upload, conflict
from fletcher.errors import StoreUnavailableError

# The names of a store, of its dataset and of an upload into that.
Key = tuple[str, str, str]

# Finished uploads are remembered for `upload_status`; older ones are read from the store.
_REMEMBERED = 1000


class Uploads:
    """Who asks for an upload that others feed, too, gets the same. Thread-safe.

    Args:
        lock: Guards them, and what `is_written` looks at: no upload is forgotten while its route
            is made. Reentrant.
        is_written: Whether rows may be on their way to a store's dataset.
    """

    def __init__(
        self, lock: threading.RLock, is_written: Callable[[tuple[str, str]], bool]
    ) -> None:
        self._lock = lock
        self._is_written = is_written
        self._all: OrderedDict[Key, Upload] = OrderedDict()  # the longest unused first
        self._opened = threading.Condition()
        self._opening: set[Key] = set()

    @contextlib.contextmanager
    def alone(self, key: Key, timeout_s: float) -> Iterator[None]:
        """One opening of an upload at a time: the first may empty the dataset, the others join.

        Raises:
            StoreUnavailableError: Another one takes longer than `timeout_s`.
        """
        with self._opened:
            if not self._opened.wait_for(lambda: key not in self._opening, timeout_s):
                raise StoreUnavailableError("the store does not answer; try again later")
            self._opening.add(key)
        try:
            yield
        finally:
            with self._opened:
                self._opening.remove(key)
                self._opened.notify_all()

    def join(
        self, key: Key, fingerprint: tuple[Any, ...], new: Upload | None = None
    ) -> Upload | None:
        """The upload in progress, or `new` where there is none (or a failed one that all left).

        Raises:
            UploadConflictError: It is in progress with another fingerprint.
        """
        with self._lock:
            upload = self._all.get(key)
            if upload is None or (upload.failure is not None and not upload.connections):
                if new is None:
                    return None
                upload = self._all[key] = new
            elif upload.fingerprint not in (None, fingerprint):
                raise conflict(key[1], key[2])
            upload.connections += 1
            self._all.move_to_end(key)
            self._forget()
            return upload

    def leave(self, upload: Upload) -> None:
        """One connection of an upload has ended."""
        with self._lock:
            upload.connections -= 1

    def get(self, key: Key) -> Upload | None:
        """The upload of that name, also one that failed."""
        with self._lock:
            return self._all.get(key)

    def find(self, store: str, dataset: str | None, upload_id: str) -> Upload | None:
        """The first upload of that name, in one dataset or in any."""
        with self._lock:
            for (its_store, its_dataset, its_id), one in self._all.items():
                if (its_store, its_id) == (store, upload_id) and dataset in (None, its_dataset):
                    return one
        return None

    def found(self, store: str, dataset: str, upload_id: str, *, upsert: bool) -> Upload:
        """The upload whose rows were found in the journal, which may be new here."""
        with self._lock:
            return self._all.setdefault(
                (store, dataset, upload_id),
                Upload(dataset, upload_id, fingerprint=None, durability="journal", upsert=upsert),
            )

    def forget_dataset(self, store: str, dataset: str) -> None:
        """The dataset was emptied: what earlier uploads stored is there no more."""
        with self._lock:
            for key, one in list(self._all.items()):
                if key[:2] == (store, dataset) and not one.connections:
                    del self._all[key]

    def _forget(self) -> None:
        """Lets go of uploads beyond those remembered, the longest unused first.

        One that has rows on their way stays: its client may come back before the store can tell
        of them.
        """
        too_many = max(0, len(self._all) - _REMEMBERED)
        done = (
            key
            for key, one in self._all.items()
            if not one.connections and not (one.pending and self._is_written(key[:2]))
        )
        for key in list(itertools.islice(done, too_many)):
            del self._all[key]
