"""Uploads of a server by store, dataset and upload id."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace

from fletcher.delivery.upload import Upload, UploadKey, UploadTerms, terms_conflict
from fletcher.errors import FletcherError, StoreUnavailableError
from fletcher.stores.staging import staged_for

# Number of uploads that are remembered for `upload_status`. The status of older ones is read from
# the store.
_REMEMBERED = 1000


class UploadRegistry:
    """Uploads of a server, in progress and remembered. Thread-safe.

    Args:
        lock: Reentrant lock for the uploads and for the data that `is_written` reads, so that no
            upload is forgotten while its sink is created.
        is_written: Callback that takes the names of a store and a dataset, and returns whether
            rows may be pending for that dataset.
    """

    def __init__(
        self, lock: threading.RLock, is_written: Callable[[tuple[str, str]], bool]
    ) -> None:
        self._lock = lock
        self._is_written = is_written
        self._all: OrderedDict[UploadKey, Upload] = OrderedDict()  # least recently joined first
        self._opened = threading.Condition()
        self._opening: set[UploadKey] = set()

    @contextlib.contextmanager
    def lock_opening(self, key: UploadKey, timeout_s: float) -> Iterator[None]:
        """Let only one connection at a time open an upload.

        Raises:
            StoreUnavailableError: Another connection takes longer than `timeout_s` to open it.
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

    def join_upload(
        self, key: UploadKey, terms: UploadTerms, new: Upload | None = None
    ) -> Upload | None:
        """Connect to the upload in progress, or else to `new`.

        Returns None if no upload is in progress and `new` is None. A lost upload, and a failed one
        without connections, do not count as in progress.

        Raises:
            UploadConflictError: The upload in progress has other settings (`fingerprint`).
        """
        with self._lock:
            upload = self._all.get(key)
            if upload is None or _has_ended(upload):
                if new is None:
                    return None
                upload = self._all[key] = new
            elif upload.terms.fingerprint not in (None, terms.fingerprint):
                raise terms_conflict(key[1], key[2])
            upload.connections += 1
            self._all.move_to_end(key)
            self._forget_unused()
            return upload

    def leave_upload(self, upload: Upload, error: FletcherError | None = None) -> None:
        with self._lock:
            upload.connections -= 1
            if error is not None and not upload.connections:
                upload.fail(error)

    def find_upload(self, store: str, dataset: str | None, upload_id: str) -> Upload | None:
        """The first upload with that id, failed or not.

        With `dataset` None, uploads to all datasets of the store are searched.
        """
        with self._lock:
            for (its_store, its_dataset, its_id), one in self._all.items():
                if (its_store, its_id) == (store, upload_id) and dataset in (None, its_dataset):
                    return one
        return None

    def forget_upload(self, key: UploadKey) -> None:
        """Forget an upload, whose rows were deleted from the store."""
        with self._lock:
            self._all.pop(key, None)

    def recover_upload(self, store: str, dataset: str, upload_id: str, *, upsert: bool) -> Upload:
        """The upload of a group found in the journal; created if it is not known yet."""
        staged_dataset = staged_for(dataset)
        terms = UploadTerms("journal", "upsert" if upsert else "append", fingerprint=None)
        if staged_dataset is not None:
            terms = replace(terms, mode="overwrite")
        dataset = staged_dataset or dataset
        with self._lock:
            return self._all.setdefault(
                (store, dataset, upload_id), Upload(dataset, upload_id, terms)
            )

    def find_uploads(self, store: str, is_wanted: Callable[[Upload], bool]) -> list[Upload]:
        with self._lock:
            return [one for key, one in self._all.items() if key[0] == store and is_wanted(one)]

    def _forget_unused(self) -> None:
        """Forget uploads beyond the limit, the least recently joined first.

        An upload with pending rows is kept, because its client may reconnect before the store has
        these rows.
        """
        too_many = max(0, len(self._all) - _REMEMBERED)
        done = (
            key
            for key, one in self._all.items()
            if not one.connections
            and not (one.pending and self._is_written((key[0], one.stored_as)))
        )
        for key in list(itertools.islice(done, too_many)):
            del self._all[key]


def _has_ended(upload: Upload) -> bool:
    return upload.failure is not None and (upload.lost or not upload.connections)
