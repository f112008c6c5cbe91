"""Disk cache: an embedding cache in LMDB, which several servers may share.

Values are read from a memory map of the file. A writer thread stores new values and the order in
which keys were used. Each of its transactions ends with a sync to disk, and no request waits for
that. If the writer's queue is full, new values are dropped.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fletcher.errors import ConfigError

log = logging.getLogger(__name__)

# Share of the file that values may fill. LMDB copies every changed page, and only later
# transactions can reuse the old page. The rest of the file is for such copies.
_FULL_SHARE = 0.5
_QUEUED_JOBS = 16
_TRANSACTION_KEYS = 1024
_EVICT_KEYS = 64
_TICK_BYTES = 8

# Keys with their values; None for a key that was only read.
_Job = list[tuple[bytes, bytes | None]]


class DiskCache:
    """Cache backend on disk; see `fletcher.pipeline.cache.CacheBackend`.

    Args:
        folder: Folder of the LMDB file, created if missing.
        max_bytes: Largest size of the file.

    Raises:
        ConfigError: LMDB is not installed, or the folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        try:
            import lmdb
        except ImportError:
            raise ConfigError(
                "`embedding_cache_dir` needs LMDB, which is not installed; run: "
                "pip install 'longbow-fletcher[cache]'",
                field="embedding_cache_dir",
            ) from None
        self._error: type[Exception] = lmdb.Error
        self._max_bytes = max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._env: Any = lmdb.open(str(folder), map_size=max_bytes, max_dbs=3, mode=0o600)
            self._values = self._env.open_db(b"values")
            self._ticks = self._env.open_db(b"ticks")  # key to tick of its last use
            self._order = self._env.open_db(b"order")  # tick to key
        except (lmdb.Error, OSError) as error:
            raise ConfigError(
                f"`embedding_cache_dir` is {str(folder)!r}, which cannot be used: {error}",
                field="embedding_cache_dir",
            ) from None
        self._jobs: queue.Queue[_Job | None] = queue.Queue(_QUEUED_JOBS)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)
        self._thread.start()

    @property
    def num_bytes(self) -> int:
        """Size of the file's pages that are in use, in bytes."""
        with contextlib.suppress(self._error), self._env.begin() as transaction:
            return self._used_bytes(transaction)
        return 0

    def load_values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Returns values, see `CacheBackend`; a wrong checksum counts as no value."""
        try:
            with self._env.begin(db=self._values) as transaction:
                found = [_checked(transaction.get(key)) for key in keys]
        except self._error as error:
            log.warning("the embedding cache cannot be read: %s", error)
            return [None] * len(keys)
        pairs = zip(keys, found, strict=True)
        self._enqueue([(key, None) for key, value in pairs if value is not None])
        return found

    def store_values(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Queues values for the writer thread, see `CacheBackend`.

        Returns before they are written.
        """
        stored = (zlib.crc32(value).to_bytes(4, "big") + value for value in values)
        self._enqueue(list(zip(keys, stored, strict=True)))

    def close(self) -> None:
        """Writes all queued values and closes the file. Idempotent."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join()
            self._env.close()

    def _enqueue(self, job: _Job) -> None:
        if job and not self._closed:
            with contextlib.suppress(queue.Full):
                self._jobs.put_nowait(job)

    def _run(self) -> None:
        ended = False
        while not ended:
            entries: _Job = []
            while not ended and len(entries) < _TRANSACTION_KEYS:
                try:
                    job = self._jobs.get(block=not entries)
                except queue.Empty:
                    break
                ended = job is None
                entries += job or []
            try:
                with self._env.begin(write=True) as transaction:
                    self._evict(transaction)
                    self._write(transaction, entries)
            except self._error as error:
                log.warning("the embedding cache cannot be written: %s", error)

    def _write(self, transaction: Any, entries: _Job) -> None:
        with transaction.cursor(db=self._order) as cursor:
            tick = int.from_bytes(cursor.key(), "big") if cursor.last() else 0
        for key, value in entries:
            before = transaction.get(key, db=self._ticks)
            if value is None and before is None:
                continue  # evicted meanwhile
            if value is not None:
                transaction.put(key, value, db=self._values)
            if before is not None:
                transaction.delete(before, db=self._order)
            tick += 1
            now = tick.to_bytes(_TICK_BYTES, "big")
            transaction.put(key, now, db=self._ticks)
            transaction.put(now, key, db=self._order)

    def _evict(self, transaction: Any) -> None:
        while self._used_bytes(transaction) > _FULL_SHARE * self._max_bytes:
            with transaction.cursor(db=self._order) as cursor:
                for _ in range(_EVICT_KEYS):
                    if not cursor.first():
                        return
                    key = cursor.value()
                    cursor.delete()
                    transaction.delete(key, db=self._values)
                    transaction.delete(key, db=self._ticks)

    def _used_bytes(self, transaction: Any) -> int:
        stats = [transaction.stat(db) for db in (self._values, self._ticks, self._order)]
        pages = sum(
            stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats
        )
        return int(pages * stats[0]["psize"])


def _checked(stored: bytes | None) -> bytes | None:
    if stored is None or zlib.crc32(stored[4:]) != int.from_bytes(stored[:4], "big"):
        return None
    return stored[4:]
