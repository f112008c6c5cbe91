"""Addresses of empty stores of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fletcher.storeserver.server import StoreServer
from tests.doubles.longbow import LongbowDouble


@contextmanager
def empty_store(kind: str, folder: Path) -> Iterator[str]:
    """The address of an empty store: `lance`, `parquet`, `fletcher` or `longbow`."""
    if kind == "fletcher":
        served = StoreServer(folder, host="127.0.0.1", port=0, meta_port=0)
        yield f"{served.address}?meta={served.meta_port}"
        served.close(10)
    elif kind == "longbow":
        with LongbowDouble() as double:
            yield double.address
    else:
        yield f"{kind}:{folder}"
