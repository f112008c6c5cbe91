"""Files that the release before the rebuild wrote: a journal, a bundle, a tune record, datasets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from time import time_ns

import numpy as np
import pyarrow as pa
import pytest

from fletcher.cli import main
from fletcher.config.delivery import DeliveryConfig, JournalConfig
from fletcher.core.command import EmbedCommand
from fletcher.delivery.delivery import Delivery
from fletcher.delivery.journal.root import folder_name
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.stores.address import open_store
from fletcher.telemetry.tracing import Telemetry
from fletcher.tuning.record import Key, load
from tests.doubles.stores import MemoryStore

PREVIOUS = Path(__file__).parents[1] / "golden" / "previous"
CONFIG = DeliveryConfig(group_rows=10, commit_rows=100, group_delay_ms=10)
ROWS = [
    {"id": "a", "text": "the first text"},
    {"id": "b", "text": "another text"},
    {"id": "c", "text": None},
    {"id": "d", "text": "a third one, somewhat longer than the others"},
]


def _recovered(name: str, store: MemoryStore, home: Path) -> Delivery:
    """Delivery on a copy of a previous journal, which is `store`'s."""
    (folder,) = (PREVIOUS / name).iterdir()
    shutil.copytree(folder, home / "journal" / folder_name(store.address))
    journal = JournalConfig(
        folder=home / "journal", max_bytes=1 << 30, segment_bytes=1 << 16, retention_s=0.0
    )
    delivery = Delivery({"default": store}, CONFIG, Telemetry(), journal)
    delivery.recover()
    return delivery


def test_rows_of_a_previous_journal_reach_their_store_once(tmp_path: Path) -> None:
    store = MemoryStore()
    delivery = _recovered("journal", store, tmp_path)
    try:
        assert delivery.flush(30)
        plain = store.rows("plain").to_pylist()
        upserts = store.rows("upserts").to_pylist()
        deduped = store.rows("deduped").to_pylist()
        command = EmbedCommand(dataset="plain", upload_id="a")
        assert delivery.upload_status(command)["rows_durable"] == 25
    finally:
        delivery.close()
    assert [(row["id"], row["text"]) for row in plain] == [
        (f"a{number}", None if number == 3 else f"text {number}") for number in range(25)
    ]
    assert [row["vector"] for row in plain[:5]] == [[6.0], [6.0], [6.0], None, [6.0]]
    assert {row["id"]: row["text"] for row in upserts} == {
        f"b{number % 8}": f"second {number}" for number in range(12)
    }
    assert [row["id"] for row in deduped] == [f"c{number}" for number in range(5)]
    assert not list((tmp_path / "journal").glob("*/*/0*.arrow"))


def test_groups_that_a_previous_process_settled_stay_settled(tmp_path: Path) -> None:
    store = MemoryStore()
    rows = pa.record_batch({"id": ["s0"], "batch_key": ["s:0-9"]})
    store.batches["d"], store.schemas["d"] = [rows], rows.schema
    delivery = _recovered("settled", store, tmp_path)
    try:
        status = delivery.upload_status(EmbedCommand(dataset="d", upload_id="t"))
    finally:
        delivery.close()
    assert (status["rows_durable"], status["ranges"]) == (10, [[0, 9]])


def test_a_previous_bundle_is_the_same_model() -> None:
    bundle = ModelBundle.from_folder(PREVIOUS / "models" / "tiny", verify=True)
    assert bundle.qualified_name == "tiny@5b813c505b8a"


def test_a_previous_tune_record_still_holds() -> None:
    bundle = ModelBundle.from_folder(PREVIOUS / "models" / "tiny", verify=True)
    key = Key({"cpu": "a cpu", "cores": 2}, {"device": "auto"}, {"model": "m", "fletcher": "0"})
    record = load(PREVIOUS, key, bundle)
    assert record is not None
    assert record.texts_per_s == 123.5
    assert record.candidate.max_batch_tokens == 2048
    assert record.candidate.configs[0].backend == "onnxruntime"


@pytest.mark.parametrize("kind", ["lance", "parquet"])
def test_a_previous_dataset_is_read_resumed_and_searched(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    began = time_ns() - 1000
    shutil.copytree(PREVIOUS / "models", home / "models")
    shutil.copytree(PREVIOUS / kind, tmp_path / kind)
    monkeypatch.setenv("FLETCHER_HOME", str(home))
    address = f"{kind}:{tmp_path / kind}"
    store = open_store(address)
    before = store.scan("before", columns=["id", "vector", "timestamp"]).read_all()
    store.close()
    assert before.column("id").to_pylist() == ["a", "b", "c", "d"]

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    target = ["--model", "tiny", "--dataset", "before", "--store", address]
    status = main(["ingest", str(rows), *target, "--upload-id", "first", "--json"])
    capfd.readouterr()
    assert status == 0
    assert main(["ingest", str(rows), *target, "--upload-id", "second", "--json"]) == 0
    capfd.readouterr()
    assert main(["search", "another text", *target, "--k", "2", "--json"]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    store = open_store(address)
    after = store.scan("before", columns=["id", "vector", "timestamp"]).read_all()
    store.close()
    if kind == "parquet":  # the resumed upload did not store its group again under another name
        names = [path.name for path in (tmp_path / kind / "before").glob("first*")]
        assert names == ["first:0-3.parquet"]
    # New rows have the unit of the dataset, and say when they were received.
    assert after.schema.field("timestamp").type == pa.timestamp("ns", "UTC")
    times = after.column("timestamp").cast(pa.int64()).to_pylist()
    assert times[:4] == before.column("timestamp").cast(pa.int64()).to_pylist()
    assert all(began <= time <= time_ns() for time in times[4:])
    assert sorted(after.column("id").to_pylist()) == sorted("abcd" * 2)
    first, second = (
        dict(zip(table.column("id").to_pylist(), table.column("vector").to_pylist(), strict=True))
        for table in (before, after.slice(4))
    )
    for name, vector in first.items():
        assert (vector is None) == (second[name] is None)
        if vector is not None:
            np.testing.assert_allclose(vector, second[name], atol=2e-3)
    assert [row["id"] for row in found] == ["a", "a"]
