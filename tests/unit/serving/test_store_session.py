"""StoreSession: rows to a store, acknowledgements back, and nothing kept after any end."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest

from fletcher.config.delivery import DeliveryConfig
from fletcher.core.command import EmbedCommand
from fletcher.delivery.delivery import Delivery
from fletcher.delivery.groups import Rows
from fletcher.errors import (
    CancelledError,
    ColumnTypeError,
    DrainingError,
    InternalError,
    InvalidCommandError,
    ModelMismatchError,
    OverloadedError,
    RowTooLargeError,
)
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.serving.background import BackgroundTask
from fletcher.serving.session import EmbedCall
from fletcher.serving.store_session import StoreSession
from fletcher.telemetry.tracing import Telemetry
from tests.doubles.service import NOTHING, FakeService
from tests.doubles.stores import MemoryStore
from tests.integration.processes import eventually

SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8()})
CONFIG = DeliveryConfig(group_rows=10, group_delay_ms=10)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def fakes(tiny_bundle: ModelBundle, store: MemoryStore) -> Iterator[FakeService]:
    def delivery(telemetry: Telemetry) -> Delivery:
        return Delivery({"default": store}, CONFIG, telemetry)

    fakes = FakeService(tiny_bundle, delivery)
    yield fakes
    store.gate.set()
    fakes.delivery.close()
    assert fakes.held() == NOTHING


def rows(first: int, *lengths: int) -> pa.RecordBatch:
    ids = list(range(first, first + len(lengths)))
    return pa.record_batch({"id": ids, "text": ["x" * length for length in lengths]}, SCHEMA)


def call(**options: Any) -> EmbedCall:
    options = {"dataset": "d", "upload_id": "u", "dtype": "float32", **options}
    return EmbedCall(name="do_put", command=EmbedCommand(**options))


class Client:
    """A session with a thread that takes its acknowledgements."""

    def __init__(self, session: StoreSession) -> None:
        self.session = session
        self.messages: list[dict[str, Any]] = []
        self._thread = BackgroundTask("client", self._take, lambda _: session.close())

    def send(self, batch: pa.RecordBatch, batch_id: int = 0, row_first: int = 0) -> None:
        self.session.submit_batch(batch, batch_id, row_first)

    def finish(self) -> dict[str, Any]:
        """Ends the input; the summary."""
        self.session.end_input()
        self._thread.join()
        return self.messages[-1]

    def _take(self) -> None:
        self.messages.extend(self.session.acknowledgements())


@contextmanager
def connected(fakes: FakeService, **options: Any) -> Iterator[Client]:
    with StoreSession(fakes.service, call(**options)) as session:
        session.open_input(SCHEMA)
        session.admit()
        yield Client(session)


def stored(store: MemoryStore) -> list[int]:
    return sorted(store.rows("d").column("id").to_pylist())


def test_rows_are_stored_acknowledged_and_summed_up(fakes: FakeService, store: MemoryStore) -> None:
    with connected(fakes) as client:
        client.send(rows(0, *range(1, 7)))
        client.send(rows(6), 1, 6)
        client.send(rows(6, 9, 9), 2, 6)
        client.session.upload.announce_total(8)
        summary = client.finish()
        assert client.session.upload.failure is None
        assert client.session.upload.complete
    assert stored(store) == list(range(8))
    acks = client.messages[:-1]
    assert [one["type"] for one in acks] == ["ack"] * len(acks)
    assert acks[0]["row_first"] == 0
    assert (acks[-1]["batch_id"], acks[-1]["row_last"], acks[-1]["rows_durable"]) == (2, 7, 8)
    assert summary["type"] == "summary"
    assert (summary["complete"], summary["rows_stored"]) == (True, 8)
    assert summary["model"] == fakes.models.served.bundle.qualified_name


def test_rows_sent_twice_are_embedded_and_stored_once(
    fakes: FakeService, store: MemoryStore
) -> None:
    with connected(fakes, normalize=False) as client:
        client.send(rows(0, 1, 2, 3, 4))
        client.send(rows(0, *[5] * 8), 1, 0)
        summary = client.finish()
    assert stored(store) == list(range(8))
    assert (summary["rows_received"], summary["rows_deduplicated"]) == (8, 4)
    assert fakes.metric("rows.deduplicated") == 4
    table = store.rows("d").sort_by("id")
    vectors = [vector[0] for vector in table.column("vector").to_pylist()]
    assert vectors == [1, 2, 3, 4, 5, 5, 5, 5]


def test_the_last_of_a_slices_rows_gives_its_memory_back(
    fakes: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(fakes) as client:
        submitted: list[Rows] = []
        monkeypatch.setattr(client.session._sink, "submit_rows", submitted.append)
        client.send(rows(1, 5), 0, 1)
        client.send(rows(0, 1, 2, 3, 4), 1, 0)  # row 1 is pending: two ranges are new
        eventually(lambda: len(submitted) == 3, "all rows are with the sink")
        assert [(one.first, one.last) for one in submitted] == [(1, 1), (0, 0), (2, 3)]
        submitted[0].on_released()
        used = fakes.held()["bytes"]
        assert used > 0
        submitted[1].on_released()
        assert fakes.held()["bytes"] == used
        submitted[2].on_released()
        assert fakes.held()["bytes"] == 0


def test_a_failed_row_is_stored_without_vector_and_reported(
    fakes: FakeService, store: MemoryStore
) -> None:
    with connected(fakes) as client:
        client.send(rows(0, 1, 1001, 3))
        summary = client.finish()
    assert (summary["rows_failed"], summary["errors"][0]["row"]) == (1, 1)
    assert summary["errors"][0]["code"] == "row_too_large"
    vectors = store.rows("d").column("vector").to_pylist()
    assert [one is None for one in vectors] == [False, True, False]


def test_memory_counts_until_rows_are_stored(fakes: FakeService, store: MemoryStore) -> None:
    store.gate.clear()
    with connected(fakes) as client:
        client.send(rows(0, 1, 2))
        eventually(store.waiting.is_set, "the store is asked")
        assert fakes.held()["bytes"] > 0
        assert client.messages == []
        store.gate.set()
        eventually(lambda: fakes.held()["bytes"] == 0, "the rows are stored")
        client.finish()


def test_rows_in_memory_alone_are_acknowledged_at_once_and_never_durable(
    fakes: FakeService, store: MemoryStore
) -> None:
    store.gate.clear()
    with connected(fakes, durability="memory") as client:
        client.send(rows(0, 1, 2))
        eventually(lambda: len(client.messages) == 1, "the batch is acknowledged")
        assert client.messages[0]["rows_durable"] == 0
        store.gate.set()
        client.finish()


def test_a_failure_of_the_delivery_fails_the_upload_and_is_in_its_summary(
    fakes: FakeService, store: MemoryStore
) -> None:
    """The summary of a client that had nothing more to send did not say why it was the last."""
    with connected(fakes, on_error="abort") as client:
        client.send(rows(0, 1, 1001))
        eventually(lambda: len(client.messages) == 1, "the summary came, without an end")
        assert client.session.upload.failure is not None
        with pytest.raises(DrainingError):
            client.send(rows(2, 1), 1, 2)
        summary = client.finish()
        assert isinstance(client.session.upload.failure, RowTooLargeError)
    assert not summary["complete"]
    assert summary["errors"][0]["code"] == "row_too_large"


def test_a_resumed_upload_sends_what_a_failed_one_did_not_store(
    fakes: FakeService, store: MemoryStore
) -> None:
    fakes.embedder.failure = OverloadedError("no workers")
    with connected(fakes) as client:
        client.send(rows(0, 1, 2))
        client.finish()
    fakes.embedder.failure = None
    with connected(fakes) as client:
        client.send(rows(0, 1, 2))
        summary = client.finish()
    assert (stored(store), summary["rows_durable"]) == ([0, 1], 2)


def test_a_session_left_early_leaves_nothing_behind(fakes: FakeService) -> None:
    fakes.embedder.holds = True
    threads = threading.active_count()
    with pytest.raises(ValueError, match="mine"), connected(fakes) as client:
        client.send(rows(0, 1, 2))
        raise ValueError("mine")
    eventually(lambda: len(client.messages) == 1, "the client is told")
    assert fakes.held() == NOTHING
    eventually(lambda: threading.active_count() <= threads + 1, "but the committer's")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dataset": None}, "dataset"),
        ({"continuous": True, "chunking": "tokens:8:none"}, "continuous"),
        ({"store": "other"}, "store"),
        ({"mode": "upsert"}, "mode"),
        ({"mode": "delta"}, "mode"),
        ({"dtype": "ubinary"}, "dtype"),
    ],
)
def test_what_the_store_cannot_do_is_refused_before_anything_is_taken(
    fakes: FakeService, store: MemoryStore, options: dict[str, Any], field: str
) -> None:
    store.capabilities = dataclasses.replace(store.capabilities, upsert=False)
    with (
        pytest.raises(InvalidCommandError) as caught,
        StoreSession(fakes.service, call(**options)),
    ):
        pass
    assert caught.value.field == field
    assert fakes.held() == NOTHING


@pytest.mark.parametrize("asked", [{"dedupe": "id"}, {"mode": "delta"}])
def test_input_without_ids_is_refused_where_they_are_compared(
    fakes: FakeService, asked: dict[str, Any]
) -> None:
    with (
        StoreSession(fakes.service, call(**asked)) as session,
        pytest.raises(InvalidCommandError, match="no column `id`"),
    ):
        session.open_input(pa.schema({"text": pa.utf8()}))


def test_a_dataset_of_another_kind_is_refused_and_all_is_given_back(
    fakes: FakeService, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ModelMismatchError("another model's")

    monkeypatch.setattr(fakes.delivery, "open_upload", refuse)
    with pytest.raises(ModelMismatchError), connected(fakes):
        pass
    assert fakes.held() == NOTHING


def test_a_bug_while_rows_are_delivered_is_an_internal_error(
    fakes: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(fakes) as client:

        def fail(_: Any) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr(client.session, "_deliver_slice", fail)
        client.send(rows(0, 1))
        client.finish()
        assert isinstance(client.session.upload.failure, InternalError)


def cancelled() -> CancelledError:
    return CancelledError("the client left")


def test_what_a_caller_that_left_sent_without_an_answer_is_not_stored(
    fakes: FakeService, store: MemoryStore
) -> None:
    fakes.embedder.holds = True
    with connected(fakes) as client:
        client.send(rows(0, 1, 2, 3))
        assert not client.session.idle
        client.session.abandon(cancelled())
        assert fakes.held()["bytes"] == fakes.held()["streams"] == 0
        summary = client.finish()
        assert [one["code"] for one in summary["errors"]] == ["cancelled"]
    fakes.embedder.answer_all()
    fakes.embedder.holds = False
    assert stored(store) == []
    with connected(fakes) as client:  # the same upload, on a new connection
        client.send(rows(0, 1, 2, 3))
        assert client.finish()["rows_stored"] == 3
    assert stored(store) == [0, 1, 2]


def test_rows_in_memory_of_a_caller_that_left_are_not_stored(
    fakes: FakeService, store: MemoryStore
) -> None:
    store.gate.clear()
    with connected(fakes) as client:
        client.send(rows(0, 1))
        eventually(lambda: client.session._session.idle, "the vector is with the sink")
        client.send(rows(1, 1), 1, 1)
        client.session.abandon(cancelled())
        client.finish()
        store.gate.set()
    with connected(fakes, upload_id="v") as client:
        client.send(rows(7, 1))
        assert client.finish()["rows_stored"] == 1
    assert set(stored(store)) <= {0, 7}  # row 0 may have been on its way


def test_rows_for_which_another_connection_waits_are_stored(
    fakes: FakeService, store: MemoryStore
) -> None:
    fakes.embedder.holds = True
    with connected(fakes) as first, connected(fakes) as second:
        first.send(rows(0, 1, 2))
        second.send(rows(0, 1, 2))  # claimed by the first connection
        first.session.abandon(cancelled())
        first.session.abandon(cancelled())
        assert first.session.upload.failure is None
        fakes.embedder.answer_all()
        assert second.finish()["rows_stored"] == 2
        first.finish()
        assert first.session.upload.failure is None
    assert stored(store) == [0, 1]


def test_rows_are_dropped_once_the_last_connection_has_left(
    fakes: FakeService, store: MemoryStore
) -> None:
    fakes.embedder.holds = True
    with connected(fakes) as first, connected(fakes) as second:
        first.send(rows(0, 1, 2))
        first.session.abandon(cancelled())
        assert fakes.held()["streams"] == 2
        second.session.abandon(cancelled())
        first.session.abandon(cancelled())  # the watch asks again
        assert fakes.held()["streams"] == 0
        for client in (first, second):
            client.finish()
    assert stored(store) == []


def test_a_silent_connection_gives_its_place_back_beside_another(fakes: FakeService) -> None:
    with connected(fakes) as silent, connected(fakes) as other:
        silent.session.abandon(OverloadedError("silent"))
        assert fakes.held()["streams"] == 1
        other.send(rows(0, 1))
        assert other.finish()["rows_stored"] == 1
        silent.session.end_input()
        assert other.session.upload.failure is None


def longbow(store: MemoryStore) -> None:
    store.capabilities = dataclasses.replace(
        store.capabilities,
        dtypes=("float32",),
        upsert=False,
        overwrite=False,
        nanosecond_times=True,
    )


def test_a_store_that_brings_deleted_rows_back_is_not_overwritten(
    fakes: FakeService, store: MemoryStore
) -> None:
    longbow(store)
    with pytest.raises(InvalidCommandError, match=r"overwrite.*new dataset") as caught:
        StoreSession(fakes.service, call(mode="overwrite")).__enter__()
    assert caught.value.allowed == ["append"]
    with pytest.raises(InvalidCommandError, match="upsert") as caught:
        StoreSession(fakes.service, call(mode="upsert")).__enter__()
    assert caught.value.allowed == ["append"]  # it named overwrite, which destroyed the dataset
    assert store.opened == []


def test_float16_is_widened_with_one_line(
    fakes: FakeService, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    longbow(store)
    with connected(fakes, dtype="float16") as client:
        client.send(rows(0, 1, 2))
        client.finish()
    assert store.rows("d").schema.field("vector").type.value_type == pa.float32()
    assert [one.message for one in caplog.records if "widened" in one.message] == [
        "`dtype` float16 is widened to float32, because the store does not search float16"
    ]
    with pytest.raises(InvalidCommandError, match="`dtype` is int8"):
        StoreSession(fakes.service, call(dtype="int8")).__enter__()


@pytest.mark.parametrize(
    ("unit", "inside", "outside"),
    [
        ("s", 9223372036, 9223372037),
        ("ms", -9223372036854, -9223372036855),
        ("ns", 2**63 - 1, None),
    ],
)
def test_a_time_beyond_nanoseconds_is_refused_before_it_is_stored(
    fakes: FakeService, store: MemoryStore, unit: str, inside: int, outside: int | None
) -> None:
    # It was refused by the store, after the rows were acknowledged as journaled.
    longbow(store)
    kind = pa.timestamp(unit)
    schema = SCHEMA.append(pa.field("at", kind))
    table = rows(0, 1, 2, 3)

    def send(client: Client, *values: int | None) -> None:
        client.send(table.append_column("at", pa.array(values, kind)))

    with StoreSession(fakes.service, call(columns=("at",))) as session:
        session.open_input(schema)
        session.admit()
        client = Client(session)
        send(client, None, inside, None)
        if outside is not None:
            with pytest.raises(ColumnTypeError, match=rf"row 2: `at` is {outside} {unit}"):
                send(client, None, inside, outside)
        client.finish()
    assert store.rows("d").num_rows == 3
