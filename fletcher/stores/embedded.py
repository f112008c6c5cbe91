"""Base classes of stores in a folder and of their writers."""

from __future__ import annotations

import errno
import logging
import os
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fletcher.core.command import CHOICES
from fletcher.core.schema import ELEMENT_TYPES
from fletcher.errors import FletcherError, StoreError, StoreUnavailableError
from fletcher.stores.base import DatasetInfo, DatasetWriter, Store, StoreCapabilities
from fletcher.stores.lock_errors import lock_errors
from fletcher.stores.staging import staged_for
from fletcher.util.closing import close_for_good
from fletcher.util.durable import make_folder
from fletcher.util.locks import FileLock

log = logging.getLogger(__name__)

# Disk errors that concern all datasets of a store. Lance reports them as part of a message.
_STORE_REASONS = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]


class EmbeddedStore(Store):
    """Store of datasets in a folder, which is created if missing. Thread-safe.

    Attributes:
        known_whole: Datasets whose newest version is known to be complete. Other datasets are
            checked before they are read or written.

    Raises:
        StoreError: The folder cannot be created.
    """

    scheme: str
    capabilities = StoreCapabilities(
        dtypes=tuple(ELEMENT_TYPES),
        null_vectors=True,
        upsert=True,
        drops_repeated_keys=False,
        durable=True,
        outputs=CHOICES["output"],
    )

    def __init__(self, folder: Path) -> None:
        self.address = f"{self.scheme}:{folder}"
        self.folder = folder
        self.writers: set[EmbeddedWriter] = set()
        self.known_whole: set[str] = set()
        self._left_out: set[str] = set()  # datasets that the log named
        # LanceDB accepts no control characters in a path. Surrogates stand for bytes that are not
        # UTF-8.
        if any(unicodedata.category(one) in ("Cc", "Cs") for one in str(folder)):
            raise StoreError(
                f"the store's folder {str(folder)!r} has a control character or a byte that is not "
                "UTF-8 in its name; give `store` or `home` another folder",
                field="store",
            )
        try:
            make_folder(folder)
        except OSError as error:
            raise StoreError(
                f"the store's folder {folder} cannot be made: {error.strerror}; give `store` "
                "or `home` a folder that can be written",
                field="store",
            ) from error

    @abstractmethod
    def dataset_names(self) -> Iterable[str]:
        """Names of the folder's datasets, staged ones included."""

    @abstractmethod
    def dataset_folder(self, name: str) -> Path:
        """The folder of a dataset, whether it exists or not."""

    def datasets(self) -> list[DatasetInfo]:
        """All datasets, sorted by name.

        The log names those left out: damaged ones, and what Fletcher did not write.
        """
        return self._list(name for name in self.dataset_names() if staged_for(name) is None)

    def staged_datasets(self) -> list[DatasetInfo]:
        return self._list(name for name in self.dataset_names() if staged_for(name) is not None)

    def _list(self, names: Iterable[str]) -> list[DatasetInfo]:
        found = []
        for name in sorted(names):
            try:
                info = self.dataset(name)
            except FletcherError as error:
                if name not in self._left_out:
                    log.warning("%s: `%s` is left out: %s", self.address, name, error)
                    self._left_out.add(name)
                continue
            if info is not None:
                found.append(info)
        return found

    def lock_dataset(self, dataset: str) -> FileLock:
        """Lock a dataset for writing.

        Lance rebases a stale commit silently, so two writers would store a group twice unnoticed.

        Raises:
            StoreUnavailableError: Another writer holds the lock, or the lock's file cannot be
                opened.
        """
        with lock_errors(dataset):
            return FileLock(self.folder / f".{dataset}.lock")

    @contextmanager
    def locked_to_its_end(self, dataset: str) -> Iterator[None]:
        """Lock a dataset that the block deletes or renames; the lock's file goes, too.

        So do those of other staged datasets of the same dataset that are gone. A process that is
        killed leaves the file behind.
        """
        lock = self.lock_dataset(dataset)
        try:
            yield
        finally:
            if self.dataset_folder(dataset).exists():
                lock.release()
            else:
                lock.remove()
        for path in self.folder.glob(f".{staged_for(dataset)}.staged-*.lock"):
            name = path.name[1:].removesuffix(".lock")
            if not self.dataset_folder(name).exists():
                with suppress(StoreUnavailableError):  # the dataset is being made
                    self.lock_dataset(name).remove()

    def close(self) -> None:
        for writer in list(self.writers):
            writer.close()


class EmbeddedWriter(DatasetWriter):
    """The only writer of a dataset. It holds the dataset's lock until `close`."""

    def __init__(self, store: EmbeddedStore, dataset: str, lock: FileLock) -> None:
        self.dataset = dataset
        self._lock = lock
        self._open_writers = store.writers
        self._open_writers.add(self)

    @property
    def is_open(self) -> bool:
        return self in self._open_writers

    def close(self) -> None:
        if self.is_open:
            self._open_writers.discard(self)
            try:
                self.finish()
            finally:
                close_for_good(self._lock.release, f"dataset `{self.dataset}`: its lock")

    def finish(self) -> None:
        """Finish the writer's work, before `close` releases the lock."""


def concerns_store(error: Exception) -> bool:
    """Whether an error of the disk concerns all datasets of a store, not one alone."""
    return any(reason in str(error) for reason in _STORE_REASONS)
