"""A text whose vector is not finite fails alone, with its row and id, on every way out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import fletcher
from fletcher.client import Client
from fletcher.config.server import ServeConfig
from fletcher.core.command import EmbedCommand
from fletcher.errors import NotFiniteError
from fletcher.models.bundle.registry import Registry
from fletcher.runtime import Runtime
from fletcher.stores.address import open_store
from tests.doubles.checkpoints import POISON, poisoned

MODELS = {"dense": "tiny", "multi": "outputs/colbert"}
TEXTS = [f"a book {number}" for number in range(40)]
TEXTS[17] = f"a {POISON} book"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vectors")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("home")
    registry = Registry(folder / "models")
    for kind, checkpoint in MODELS.items():
        registry.add_model(str(poisoned(checkpoint, folder)), name=kind, progress=print)
    config = ServeConfig.from_options(
        port=0,
        home=folder,
        model="dense",
        models=("multi",),
        device="cpu",
        store=(f"lance:{store}",),
        max_journal=0,
        group_delay_ms=20,
        embedding_cache=1 << 20,
        allow_undeclared=True,
    )
    with Runtime(config) as runtime, fletcher.connect(runtime.address) as client:
        yield client


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        yield from numbers(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            yield from numbers(one)
    else:
        yield value


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float16"},
        {"dtype": "int8"},
        {"dtype": "ubinary"},
        {"dtype": "float32", "normalize": False},
        {"dtype": "float32", "dims": 16},
        {"dtype": "float32", "priority": "interactive"},
        {"dtype": "float32", "chunking": "tokens:8:mean"},
        {"dtype": "float32", "chunking": "tokens:8:max"},
        {"dtype": "float16", "chunking": "tokens:12/3:none:late"},
        {"dtype": "float32", "model": "multi"},
        {"dtype": "int8", "model": "multi"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_an_exchange_fails_that_row_alone(client: Client, options: dict[str, Any]) -> None:
    rows = pa.table({"id": [f"row {number}" for number in range(40)], "text": TEXTS})
    for _ in range(2):  # the second time, the other rows come from the cache
        errors, found = [], []
        with client.exchange(rows, EmbedCommand.from_mapping(options)) as exchange:
            for batch in exchange:
                found += zip(
                    batch.column("id").to_pylist(), batch.column("vector").to_pylist(), strict=True
                )
                errors += exchange.errors
        assert [(error.row, error.id, error.code) for error in errors] == [
            (17, "row 17", "not_finite")
        ]
        assert [name for name, vector in found if vector is None] == ["row 17"]
        assert {name for name, _ in found} == {f"row {number}" for number in range(40)}
        assert all(map(math.isfinite, numbers([vector for _, vector in found if vector])))


def test_an_upload_stores_the_other_rows(client: Client, store: Path) -> None:
    rows = pa.table({"id": [f"row {number}" for number in range(40)], "text": TEXTS})
    summary = client.put(rows, EmbedCommand(dataset="d", upload_id="u", durability="store"))
    counts = summary.complete, summary.rows_stored, summary.rows_failed
    assert counts == (True, 40, 1)  # the failed row is stored with a null vector
    assert [(one.row, one.id, one.code) for one in summary.errors] == [(17, "row 17", "not_finite")]
    opened = open_store(f"lance:{store}")
    stored = opened.scan("d", columns=["id", "vector"]).read_all().to_pylist()
    opened.close()
    with_vector = {row["id"] for row in stored if row["vector"] is not None}
    assert with_vector == {f"row {number}" for number in range(40)} - {"row 17"}


def test_embed_names_the_code_and_the_next_call_is_right(client: Client) -> None:
    for priority in ("interactive", "bulk"):
        with pytest.raises(NotFiniteError, match="NaN or infinity"):
            client.embed([TEXTS[17]], priority=priority)
        assert abs((client.embed([TEXTS[0]], priority=priority) ** 2).sum() - 1) < 1e-3


def test_an_upload_that_aborts_says_why(client: Client) -> None:
    rows = pa.table({"text": TEXTS})
    with pytest.raises(NotFiniteError):
        client.put(rows, EmbedCommand(dataset="e", upload_id="v", on_error="abort"))
