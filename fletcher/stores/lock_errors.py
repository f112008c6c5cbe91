"""Errors of the locks of datasets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fletcher.errors import StoreUnavailableError


@contextmanager
def lock_errors(dataset: str, *, where: str = "") -> Iterator[None]:
    """Context that locks a dataset for writing.

    `where` says after "another process or upload" where that may be.

    Raises:
        StoreUnavailableError: Another writer holds the lock, or it cannot be taken.
    """
    try:
        yield
    except BlockingIOError as error:
        raise StoreUnavailableError(
            f"dataset `{dataset}` is being written by another process or upload{where}; wait for "
            "it to end, or let both write through one server",
            field="dataset",
            retry_after_ms=1000,
        ) from error
    except OSError as error:
        raise StoreUnavailableError(
            f"dataset `{dataset}` cannot be locked for writing: {error.strerror}",
            field="dataset",
        ) from error
