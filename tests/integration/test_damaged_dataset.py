"""One dataset that is damaged, beside healthy ones of its store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pytest

from fletcher.config.delivery import DeliveryConfig, JournalConfig
from fletcher.core.command import EmbedCommand
from fletcher.delivery.delivery import Delivery
from fletcher.delivery.groups import Rows
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.timing import DeliveryTiming
from fletcher.delivery.upload import Upload
from fletcher.stores.address import open_store
from fletcher.stores.base import Store
from fletcher.storeserver.server import StoreServer
from fletcher.telemetry.tracing import Telemetry
from fletcher.util.backoff import Backoff
from tests.doubles import store_rows as rows
from tests.integration.processes import eventually

SCHEMA = pa.schema(list(rows.schema())[:-1], metadata=rows.schema().metadata)
RETRY = Backoff(first_s=0.01, longest_s=0.02, jitter=0.0)


class Beside:
    """A delivery to one store, and the store's folder of datasets."""

    def __init__(self, store: Store, folder: Path, journal: Path) -> None:
        self.folder = folder
        self.store = store
        self.telemetry = Telemetry()
        self.delivery = Delivery(
            {"default": store},
            DeliveryConfig(
                group_rows=50,
                commit_rows=500,
                group_delay_ms=1,
                store_retry_s=60,
                store_timeout_s=20,
            ),
            self.telemetry,
            JournalConfig(folder=journal, max_bytes=1 << 30, segment_bytes=1 << 20, retention_s=0),
            DeliveryTiming(retry=RETRY),
        )

    def open(self, dataset: str, upload_id: str = "u") -> tuple[Upload, DatasetSink]:
        return self.delivery.open_upload(EmbedCommand(dataset=dataset, upload_id=upload_id), SCHEMA)

    def send(self, upload: Upload, sink: DatasetSink, first: int = 0) -> None:
        upload.claim_rows(first, first + 9)
        batch = rows.batch(first, 10).drop_columns(["batch_key"])
        sink.submit_rows(Rows.from_batch(upload, batch, first, (), lambda: None))

    def store_rows(self, dataset: str, upload_id: str = "u") -> None:
        upload, sink = self.open(dataset, upload_id)
        self.send(upload, sink)
        assert stored(upload, 10)

    def await_retries(self, number: int) -> None:
        begun = sum(self.telemetry.store_retries.values().values())
        eventually(
            lambda: sum(self.telemetry.store_retries.values().values()) >= begun + number,
            f"{number} appends failed",
        )


@pytest.fixture(params=["lance", "parquet", "fletcher store"])
def beside(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Beside]:
    folder = tmp_path / "store"
    with ExitStack() as stack:
        address = f"{request.param}:{folder}"
        if request.param == "fletcher store":
            served = StoreServer(folder, host="127.0.0.1", port=0, meta_port=0)
            stack.callback(served.close, 10)
            address = f"{served.address}?meta={served.meta_port}"
        one = Beside(open_store(address, timeout_s=20), folder, tmp_path / "journal")
        stack.callback(one.delivery.close)
        yield one


def test_a_damaged_dataset_makes_no_other_dataset_wait(beside: Beside) -> None:
    beside.store_rows("good")
    bad, sink = beside.open("bad")
    beside.send(bad, sink)
    assert stored(bad, 10)
    (path,) = beside.folder.glob("bad*")
    shutil.move(path, path.with_name("kept"))
    path.write_text("a file")
    beside.send(bad, sink, first=10)
    beside.await_retries(6)
    state = beside.delivery.statistics()["default"]
    assert (state["state"], state["outages"]) == ("there", 0)
    beside.store_rows("good", "second")
    beside.store_rows("new")
    assert bad.failure is None  # its rows wait in the journal
    path.unlink()
    shutil.move(path.with_name("kept"), path)
    assert stored(bad, 20)


def stored(upload: Upload, num_rows: int) -> bool:
    with upload.changed:
        return upload.changed.wait_for(lambda: upload.counts()["rows_stored"] == num_rows, 30)
