"""Uploads of two callers with the same upload id."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import fletcher
from fletcher.config.server import ServeConfig
from fletcher.errors import FletcherError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.runtime import Runtime
from tests.integration.conftest import StartServer

TOKENS = {"alice": "token-of-alice", "bob": "token-of-bob"}


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    path = tmp_path_factory.mktemp("owners") / "tokens"
    path.write_text("\n".join(TOKENS.values()), encoding="utf-8")
    return start_server(token_file=path)


@pytest.fixture(params=[("alice", "bob"), ("bob", "alice")], ids=lambda pair: pair[0])
def clients(
    server: Runtime, request: pytest.FixtureRequest
) -> Iterator[tuple[fletcher.Client, fletcher.Client]]:
    first, second = (TOKENS[name] for name in request.param)
    with (
        fletcher.connect(server.address, token=first) as one,
        fletcher.connect(server.address, token=second) as two,
    ):
        yield one, two


@pytest.fixture
def dataset(request: pytest.FixtureRequest) -> str:
    return f"d{zlib.crc32(request.node.name.encode())}"


def rows(who: str, first: int, last: int) -> pa.Table:
    numbers = range(first, last)
    return pa.table(
        {
            "id": [f"{who}-{row}" for row in numbers],
            "text": [f"{who} writes {row}" for row in numbers],
        }
    )


def test_the_same_id_by_two_callers_is_two_uploads(
    server: Runtime, clients: tuple[fletcher.Client, fletcher.Client], dataset: str
) -> None:
    # The second caller's rows were taken for the first one's, and dropped.
    one, two = clients
    options = fletcher.EmbedCommand(dataset=dataset, upload_id="nightly")
    assert one.put(rows("one", 0, 5), options, end=False).rows_durable == 5
    assert two.upload_status("nightly", dataset)["ranges"] == []
    summary = two.put(rows("two", 0, 10), options)
    assert summary.complete
    assert summary.rows_received == summary.rows_durable == 10
    assert summary.rows_deduplicated == 0
    assert summary.upload_id == "nightly"
    assert one.upload_status("nightly", dataset) == {
        "rows_durable": 5,
        "ranges": [[0, 4]],
        "complete": False,
    }
    assert one.put(rows("one", 0, 8), options, resume=True).complete
    assert server.service.delivery.flush(30)
    _, store = server.service.delivery.store(None)
    stored = store.scan(dataset, columns=["id"]).read_all().column("id").to_pylist()
    assert sorted(stored) == sorted(
        [f"one-{row}" for row in range(8)] + [f"two-{row}" for row in range(10)]
    )


def test_nobody_ends_another_callers_upload(
    clients: tuple[fletcher.Client, fletcher.Client], dataset: str
) -> None:
    one, two = clients
    options = fletcher.EmbedCommand(dataset=dataset, upload_id="long")
    assert one.put(rows("one", 0, 5), options, end=False).rows_durable == 5
    failing = fletcher.EmbedCommand(dataset=dataset, upload_id="long", on_error="abort")
    failing_row = pa.table({"id": ["x"], "text": pa.array([None], pa.utf8())})
    with pytest.raises(FletcherError):
        two.put(failing_row, failing, row_offset=5)
    assert one.put(rows("one", 0, 9), options, resume=True).complete


def test_rows_without_ids_get_the_id_that_the_caller_knows(
    server: Runtime, clients: tuple[fletcher.Client, fletcher.Client], dataset: str
) -> None:
    one, _ = clients
    options = fletcher.EmbedCommand(dataset=dataset, upload_id="plain")
    assert one.put(pa.table({"text": ["a"]}), options).complete
    assert server.service.delivery.flush(30)
    _, store = server.service.delivery.store(None)
    assert store.scan(dataset, columns=["id"]).read_all()["id"].to_pylist() == ["plain:0"]


@pytest.mark.parametrize("mode", ["append", "upsert", "overwrite"])
def test_a_server_with_its_own_token_resumes_uploads_of_the_server_before_it(
    mode: Any, tiny_home: Path, tiny_bundle: ModelBundle, tmp_path: Path
) -> None:
    # Each run of a command without --server has a token of its own.
    config = ServeConfig.from_options(
        home=tiny_home,
        model=tiny_bundle.name,
        backend="null",
        port=0,
        store=(f"lance:{tmp_path}",),
        max_journal=0,
    )
    options = fletcher.EmbedCommand(dataset="d", upload_id="u", mode=mode, durability="store")
    for token, num_rows, durable, end in [("one", 5, 0, False), ("two", 8, 5, True)]:
        with (
            Runtime(config, own_token=token) as runtime,
            fletcher.connect(runtime.address, token=token) as client,
        ):
            assert client.upload_status("u", "d")["rows_durable"] == durable
            client.put(rows("one", 0, num_rows), options, end=end, resume=True)
            _, store = runtime.service.delivery.store(None)
            if end:
                stored = store.scan("d", columns=["id", "batch_key"]).read_all()
    assert sorted(stored["id"].to_pylist()) == [f"one-{row}" for row in range(8)]
    assert {key.partition(":")[0] for key in stored["batch_key"].to_pylist()} == {"u"}
