"""A LanceDB table's folder: sync and check of the files of a commit."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from fletcher.errors import StoreUnavailableError
from fletcher.stores.lance.repair import (
    find_defect,
    is_noted_synced,
    newest_version,
    note_synced,
)
from fletcher.util.durable import sync_path


class SyncedFolder:
    """Folder of a table, and its files that are known to be on disk. Thread-safe.

    Args:
        folder: The table's folder `NAME.lance`.
        known_whole: Datasets whose newest version is known to be complete; see `EmbeddedStore`.
    """

    def __init__(self, folder: Path, known_whole: set[str]) -> None:
        self._folder = folder
        self._known_whole = known_whole
        self._synced: set[str] = set()
        self._mutex = threading.Lock()

    def sync_new_files(self, *, settled: bool) -> None:
        """Sync new files, then the folders that hold them.

        Lance changes no file in place except its version hint, which it does not need. The first
        call syncs no file if the newest version is noted as synced.

        Args:
            settled: Whether nothing else writes to the table now. If false, a new file may be
                incomplete, and the next call syncs it again.

        Raises:
            StoreUnavailableError: The newest version has a truncated file. LanceDB commits such a
                file without an error if the disk failed at the file's last write. The table has to
                be opened again, which sets that version aside.
        """
        with self._mutex:
            version, manifest = newest_version(self._folder)
            if settled and not self._synced and is_noted_synced(self._folder, version):
                self._synced = {
                    f"{folder}/{name}"
                    for folder, folders, names in os.walk(self._folder)
                    for name in (*folders, *names)
                }
                return
            present = set()
            changed: set[str] = set()
            for folder, folders, names in os.walk(self._folder):
                inner = [f"{folder}/{name}" for name in folders]
                changed.update(folder for path in inner if path not in self._synced)
                present.update(inner)
                for name in names:
                    path = f"{folder}/{name}"
                    present.add(path)
                    if path not in self._synced:
                        with contextlib.suppress(FileNotFoundError):  # a temporary file
                            sync_path(path)
                        changed.add(folder)
            for folder in changed:
                sync_path(folder)
            if not self._synced:
                sync_path(self._folder.parent)
            if manifest is not None:
                self._check(manifest)
            self._synced = present if settled else self._synced & present
            note_synced(self._folder, version)

    def _check(self, manifest: Path) -> None:
        defect = find_defect(manifest, self._folder, self._synced)
        if defect:
            dataset = self._folder.stem
            self._known_whole.discard(dataset)
            raise StoreUnavailableError(
                f"dataset `{dataset}`: {defect}: the disk failed while LanceDB wrote it",
                field="dataset",
            )
