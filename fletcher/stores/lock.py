"""Advisory lock of a dataset's one writer."""

from __future__ import annotations

from pathlib import Path

from fletcher.errors import StoreUnavailableError
from fletcher.util.locks import FileLock


def lock_dataset(folder: Path, dataset: str) -> FileLock:
    """Take the right to write to a dataset of an embedded store.

    Lance rebases a stale commit silently, so two writers would store a group twice unnoticed.

    Args:
        folder: Of the store.
        dataset: Its name.

    Raises:
        StoreUnavailableError: Another writer holds the lock, or its file cannot be opened.
    """
    try:
        return FileLock(folder / f".{dataset}.lock")
    except BlockingIOError as error:
        raise StoreUnavailableError(
            f"dataset `{dataset}` is being written by another process or upload; wait for it "
            "to end, or let both write through one server",
            field="dataset",
            retry_after_ms=1000,
        ) from error
    except OSError as error:
        raise StoreUnavailableError(
            f"dataset `{dataset}` cannot be locked for writing: {error.strerror}", field="dataset"
        ) from error
