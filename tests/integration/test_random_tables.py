"""Random tables through every reader and into every store, and back."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from fletcher.stores.address import open_store
from fletcher.storeserver.server import StoreServer
from tests.doubles.random_tables import check_table

TABLES = 12


@pytest.mark.parametrize("kind", ["lance", "parquet", "server"])
def test_random_tables_come_back_as_they_were(tmp_path: Path, kind: str) -> None:
    results: Counter[str] = Counter()
    server = None
    if kind == "server":
        server = StoreServer(tmp_path / "s", host="127.0.0.1", port=0, meta_port=0)
    address = (
        f"{kind}:{tmp_path / 's'}"
        if server is None
        else f"grpc://127.0.0.1:{server.port}?meta={server.meta_port}"
    )
    try:
        with closing(open_store(address)) as store:
            for seed in range(TABLES):
                folder = tmp_path / str(seed)
                folder.mkdir()
                results[check_table(random.Random(seed), folder, [store], f"d{seed}")] += 1
    finally:
        if server is not None:
            server.close(timeout_s=5.0)
    assert results["stored"] >= TABLES / 2, results
