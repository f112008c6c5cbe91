"""EmbedSession: order, early ends, errors at every step, and everything given back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fletcher.core.command import EmbedCommand
from fletcher.errors import (
    BatchTooLargeError,
    DimensionMismatchError,
    DrainingError,
    FletcherError,
    InternalError,
    OverloadedError,
    RowTooLargeError,
    UnknownColumnError,
    UnknownModelError,
)
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.serving.callers import Caller
from fletcher.serving.load_level import LoadSignals
from fletcher.serving.session import EmbedCall, EmbedSession
from fletcher.serving.slice_result import SliceResult
from tests.doubles.service import MAX_STREAMS, NOTHING, FakeService
from tests.integration.processes import eventually

SCHEMA = pa.schema({"text": pa.utf8()})
DICTIONARY = pa.schema({"text": pa.dictionary(pa.int32(), pa.utf8())})


@pytest.fixture
def fakes(tiny_bundle: ModelBundle) -> Iterator[FakeService]:
    fakes = FakeService(tiny_bundle)
    yield fakes
    assert fakes.held() == NOTHING


def call(**options: Any) -> EmbedCall:
    fields = {name: options.pop(name) for name in list(options) if name in EmbedCall.__slots__}
    command = EmbedCommand(dtype="float32", normalize=False, **options)
    return EmbedCall(name="test", command=command, **fields)


def texts(*lengths: int) -> pa.RecordBatch:
    return pa.record_batch({"text": ["x" * length for length in lengths]}, SCHEMA)


def lengths_of(result: SliceResult) -> list[int]:
    return [int(vector[0]) for vector in result.batch.column("vector").to_pylist()]


@contextmanager
def opened(
    fakes: FakeService, one: EmbedCall, schema: pa.Schema = SCHEMA
) -> Iterator[EmbedSession]:
    """A session that is entered and admitted."""
    with EmbedSession(fakes.service, one) as session:
        session.open_input(schema)
        session.admit(bulk=True)
        yield session


def test_results_come_in_the_order_of_submission_and_end_after_the_last(fakes: FakeService) -> None:
    with opened(fakes, call()) as session:
        session.submit_batch(texts(*range(1, 11)), 3, 100)
        session.submit_batch(texts(), 4, 110)
        session.submit_batch(texts(20, 30), 7, 110)
        session.end_input()
        found = [
            (one.row_slice.batch_id, one.row_slice.row_first, one.row_slice.last, lengths_of(one))
            for one in session.results("u")
        ]
    assert found == [
        (3, 100, False, [1, 2, 3, 4]),
        (3, 104, False, [5, 6, 7, 8]),
        (3, 108, True, [9, 10]),
        (4, 110, True, []),
        (7, 110, True, [20, 30]),
    ]
    assert fakes.metric("rows.received") == 12
    assert fakes.telemetry.failures == [None]


def test_rows_without_ids_are_named_after_the_upload(fakes: FakeService) -> None:
    with opened(fakes, call()) as session:
        session.submit_batch(texts(1, 2), 0, 5)
        session.end_input()
        (result,) = session.results("mine")
        assert result.batch.column("id").to_pylist() == ["mine:5", "mine:6"]


def test_a_result_counts_until_the_next_is_asked_for_and_one_that_is_held_longer(
    fakes: FakeService,
) -> None:
    with opened(fakes, call()) as session:
        session.submit_batch(texts(*[1] * 12), 0, 0)
        session.end_input()
        used = fakes.held()["bytes"]
        results = session.results("u")
        next(results)
        assert fakes.held()["bytes"] == used
        held = next(results)
        after_one = fakes.held()["bytes"]
        assert 0 < after_one < used
        release = held.hold()
        next(results)
        assert fakes.held()["bytes"] == after_one
        assert list(results) == []
        only_held = fakes.held()["bytes"]
        assert 0 < only_held < after_one
        release()
        assert fakes.held()["bytes"] == 0


def test_nothing_of_a_result_is_left_while_the_next_is_to_come(fakes: FakeService) -> None:
    """A client that sends nothing for hours would keep its last vectors in memory."""
    fakes.embedder.holds = True
    kept: list[weakref.ref[Any]] = []
    taken = threading.Semaphore(0)

    def take() -> None:
        for result in session.results("u"):
            kept.append(weakref.ref(result.batch))
            kept.append(weakref.ref(result.row_slice.rows))
            del result
            taken.release()

    with opened(fakes, call()) as session:
        thread = threading.Thread(target=take)
        thread.start()
        session.submit_batch(texts(1, 2), 0, 0)
        kept += map(weakref.ref, [ticket.texts.offsets for ticket in fakes.embedder.tickets])
        fakes.embedder.answer_all()
        assert taken.acquire(timeout=30)
        eventually(lambda: fakes.held()["bytes"] == 0, "the thread waits for the second")
        eventually(lambda: [one() for one in kept] == [None] * 3, "the first is gone")
        session.end_input()
        thread.join(30)


def test_submission_waits_for_memory_and_goes_on_when_results_are_taken(
    tiny_bundle: ModelBundle,
) -> None:
    fakes = FakeService(tiny_bundle, max_bytes=4096)
    with opened(fakes, call()) as session:
        thread = threading.Thread(target=session.submit_batch, args=(texts(*[1] * 40), 0, 0))
        thread.start()
        eventually(lambda: fakes.held()["bytes"] > 1024, "some slices are in")
        thread.join(0.05)
        assert thread.is_alive()
        results = session.results("u")
        found = sum(len(lengths_of(next(results))) for _ in range(10))
        thread.join(30)
        session.end_input()
        assert (found, list(results)) == (40, [])
    assert fakes.held() == NOTHING


def test_only_claimed_rows_are_embedded(fakes: FakeService) -> None:
    batch = texts(1, 2, 3, 4, 5, 6)
    with opened(fakes, call()) as session:
        session.submit_batch(batch, 0, 0, claim=lambda one: [] if one.row_first else [(1, 2)])
        session.end_input()
        found = [(one.ranges, lengths_of(one)) for one in session.results("u")]
    assert found == [([(1, 2)], [1, 2, 3, 4])]


def test_errors_of_claimed_rows_alone_are_counted(fakes: FakeService) -> None:
    with opened(fakes, call()) as session:
        batch = texts(1001, 2, 1001, 4)
        session.submit_batch(batch, 0, 10, claim=lambda _: [(10, 11)])
        session.submit_batch(batch, 1, 14)
        session.end_input()
        results = [sorted(one.errors) for one in session.results("u")]
    assert results == [[0, 2], [0, 2]]
    assert fakes.metric("rows.failed") == 3
    assert fakes.metric("errors") == {"row_too_large": 3}


def test_errors_are_reported_by_offset_and_with_short_ids(fakes: FakeService) -> None:
    schema = pa.schema({"id": pa.utf8(), "text": pa.utf8()})
    batch = pa.record_batch({"id": ["a", "b" * 2000, "c"], "text": ["x", None, "x" * 1001]}, schema)
    with opened(fakes, call(), schema) as session:
        session.submit_batch(batch, 0, 7)
        session.end_input()
        (result,) = session.results("u")
        reports = result.error_reports(10)
        assert [(one["row"], one["code"]) for one in reports] == [
            (8, "invalid_command"),
            (9, "row_too_large"),
        ]
        assert reports[0]["id"] == "b" * 1024
        assert [one["row"] for one in result.error_reports(1)] == [8]


def test_a_dictionary_that_comes_with_an_empty_batch_is_not_lost(fakes: FakeService) -> None:
    """Uploads left its slice out, and rows of the next batch had no vectors to take."""
    words = pa.array(["x", "xx", "xxx"])

    def coded(*codes: int) -> pa.RecordBatch:
        column = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), words)
        return pa.record_batch({"text": column}, DICTIONARY)

    with opened(fakes, call(), DICTIONARY) as session:
        for number, batch in enumerate((coded(), coded(2, 0, 2), coded(1))):
            last = number * 10 + batch.num_rows - 1
            ranges = [(number * 10, last)] if batch.num_rows else []
            session.submit_batch(batch, number, number * 10, claim=lambda _, found=ranges: found)
        session.end_input()
        found = [lengths_of(one) for one in session.results("u")]
    assert found == [[], [3, 1, 3], [2]]


@pytest.mark.parametrize("abort", ["command", "call"])
def test_a_failed_row_ends_the_call_where_it_is_told_to(fakes: FakeService, abort: str) -> None:
    asked = call(on_error="abort") if abort == "command" else call(abort=True)
    with opened(fakes, asked) as session:
        session.submit_batch(texts(1, 1001), 0, 0)
        session.end_input()
        with pytest.raises(RowTooLargeError):
            list(session.results("u"))


def test_a_retryable_failure_ends_every_call(fakes: FakeService) -> None:
    fakes.embedder.failure = OverloadedError("no workers")
    with opened(fakes, call()) as session:
        session.submit_batch(texts(1), 0, 0)
        session.end_input()
        with pytest.raises(OverloadedError):
            list(session.results("u"))
    assert fakes.metric("rows.failed") == 0


@pytest.mark.parametrize("num_taken", [0, 1, 2])
def test_an_early_close_wakes_everybody(fakes: FakeService, num_taken: int) -> None:
    fakes.embedder.holds = True
    outcome: list[Any] = []

    def take() -> None:
        try:
            outcome.extend(lengths_of(one) for one in session.results("u"))
        except DrainingError as error:
            outcome.append(error.code)

    with opened(fakes, call()) as session:
        thread = threading.Thread(target=take)
        thread.start()
        for number in range(num_taken):
            session.submit_batch(texts(number), number, 0)
        fakes.embedder.answer_all()
        eventually(lambda: fakes.held()["bytes"] == 0, "all are taken")
        session.submit_batch(texts(9), 9, 0)
        session.close()
        session.close()
        thread.join(30)
        assert outcome == [*([number] for number in range(num_taken)), "draining"]
        with pytest.raises(DrainingError):
            session.submit_batch(texts(1), 0, 0)


def test_one_batch_is_embedded_on_the_calling_thread(fakes: FakeService) -> None:
    threads = threading.active_count()
    with opened(fakes, call()) as session:
        results = session.embed_batch(texts(5, 6), "embed")
        assert [lengths_of(one) for one in results] == [[5, 6]]
        assert threading.active_count() == threads
    assert fakes.metric("rows.received") == 0


def test_one_batch_larger_than_its_memory_is_embedded(tiny_bundle: ModelBundle) -> None:
    fakes = FakeService(tiny_bundle, max_bytes=4096)
    with opened(fakes, call()) as session:
        found = [
            length
            for one in session.embed_batch(texts(*range(99)), "e")
            for length in lengths_of(one)
        ]
    assert found == list(range(99))
    assert fakes.held() == NOTHING


def test_a_failed_submission_of_one_batch_is_told(
    fakes: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(fakes, call()) as session:
        stream = fakes.embedder.streams[-1]

        def fail(*_: Any, **__: Any) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr(stream, "submit", fail)
        with pytest.raises(InternalError):
            list(session.embed_batch(texts(*range(9)), "embed"))


def test_the_lease_is_asked_for_as_the_call_says(fakes: FakeService) -> None:
    caller = Caller(SimpleNamespace(is_cancelled=lambda: False))
    asked = call(model="m", alias_key="k", dataset_model="m@1", caller=caller)
    with EmbedSession(fakes.service, asked) as session:
        assert session.model.bundle is fakes.models.served.bundle
        options = {"alias_key": "k", "dataset_model": "m@1", "is_cancelled": caller.is_cancelled}
        assert fakes.models.leased == [("m", options)]


Step = Callable[[FakeService], None]


def _steps(fakes: FakeService, asked: EmbedCall, schema: pa.Schema, batch: pa.RecordBatch) -> None:
    with EmbedSession(fakes.service, asked) as session:
        session.open_input(schema)
        session.admit(bulk=True)
        session.submit_batch(texts(1, 2), 0, 0)
        session.submit_batch(batch, 1, 2)
        session.end_input()
        list(session.results("u"))


def _unknown_model(fakes: FakeService) -> None:
    fakes.models.refusal = UnknownModelError("no such model")


def _no_workers(fakes: FakeService) -> None:
    fakes.embedder.refusal = OverloadedError("no workers")


def _severe(fakes: FakeService) -> None:
    fakes.signals = LoadSignals(streams=1.0)


def _draining(fakes: FakeService) -> None:
    fakes.admission.draining.set()


def _stream_fails(fakes: FakeService) -> None:
    fakes.embedder.broken = InternalError("a bug")


def _fails(fakes: FakeService) -> None:
    fakes.embedder.failure = OverloadedError("no workers")


def _nothing(fakes: FakeService) -> None:
    pass


@pytest.mark.parametrize(
    ("before", "asked", "schema", "batch", "kind"),
    [
        (_unknown_model, {}, SCHEMA, texts(1), UnknownModelError),
        (_nothing, {"dims": 31}, SCHEMA, texts(1), DimensionMismatchError),
        (_nothing, {"text_column": "other"}, SCHEMA, texts(1), UnknownColumnError),
        (_no_workers, {}, SCHEMA, texts(1), OverloadedError),
        (_severe, {}, SCHEMA, texts(1), OverloadedError),
        (_draining, {}, SCHEMA, texts(1), DrainingError),
        (_stream_fails, {}, SCHEMA, texts(1), InternalError),
        (_nothing, {}, SCHEMA, texts(*[1000] * 1100), BatchTooLargeError),
        (_nothing, {"on_error": "abort"}, SCHEMA, texts(1, 1001), RowTooLargeError),
        (_fails, {}, SCHEMA, texts(1), OverloadedError),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_") or None,
)
def test_whatever_step_fails_everything_is_given_back(
    fakes: FakeService,
    before: Step,
    asked: dict[str, Any],
    schema: pa.Schema,
    batch: pa.RecordBatch,
    kind: type[FletcherError],
) -> None:
    before(fakes)
    with pytest.raises(kind):
        _steps(fakes, call(**asked), schema, batch)
    assert fakes.held() == NOTHING
    assert all(isinstance(error, kind) for error in fakes.telemetry.failures)


def test_a_call_without_a_place_is_refused_before_its_first_row(fakes: FakeService) -> None:
    with ExitStack() as others:
        for _ in range(MAX_STREAMS):
            others.enter_context(opened(fakes, call()))
        with EmbedSession(fakes.service, call()) as session:
            session.open_input(SCHEMA)
            with pytest.raises(OverloadedError, match="max_streams"):
                session.admit(bulk=False)
        assert fakes.held() == {**NOTHING, "leases": 2, "streams": 2, "spans": 2}


def test_long_texts_in_parts_are_claimed_once_and_their_memory_comes_back(
    fakes: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = []

    def claim(row_slice: Any) -> list[tuple[int, int]]:
        claimed.append((row_slice.row_first, row_slice.part))
        return [(row_slice.row_first, row_slice.row_first)]

    fakes.embedder.failure = RowTooLargeError("a part fails")
    asked = call(chunking="tokens:8/2:mean", whole_rows=True)
    with opened(fakes, asked) as session:
        words = " ".join("word" for _ in range(190))
        batch = pa.record_batch({"text": [words]}, SCHEMA)
        session.submit_batch(batch, 0, 3, claim=claim)
        session.end_input()
        (result,) = session.results("u")
        assert np.array_equal(list(result.errors), [0])
        assert result.ranges == [(3, 3)]
    assert claimed == [(3, 0)]


@pytest.mark.parametrize("before_admission", [True, False])
def test_an_abandoned_call_gives_all_back_and_says_why(
    fakes: FakeService, before_admission: bool
) -> None:
    fakes.embedder.holds = True
    gone = OverloadedError("silent")
    with EmbedSession(fakes.service, call()) as session:
        session.open_input(SCHEMA)
        assert session.idle
        if before_admission:
            session.abandon(gone)
        session.admit(bulk=True)
        if not before_admission:
            session.submit_batch(texts(1, 2), 0, 0)
            assert not session.idle
            session.abandon(gone)
        assert fakes.held()["streams"] == fakes.held()["bytes"] == 0
        with pytest.raises(OverloadedError, match="silent"):
            session.submit_batch(texts(1), 1, 2)
        with pytest.raises(OverloadedError, match="silent"):
            list(session.results("u"))
