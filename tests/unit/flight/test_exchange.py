"""Answers of an exchange: put together from slices, inside the memory budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pytest
from pyarrow.flight import FlightError

from fletcher.core.command import EmbedCommand
from fletcher.errors import BatchTooLargeError, CancelledError
from fletcher.flight.answers import Answers, AnswerWriter
from fletcher.flight.exchange import exchange
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.net.compression import CallCompression
from fletcher.net.flight_errors import to_flight_error
from fletcher.serving.callers import Caller
from fletcher.serving.session import EmbedCall, EmbedSession
from tests.doubles.service import NOTHING, FakeService

SCHEMA = pa.schema({"text": pa.dictionary(pa.int8(), pa.utf8())})
ROWS = 3 * 4  # three slices


class Writer:
    """Flight's writer; keeps answers, and what the budget says while each is written."""

    def __init__(self, fakes: FakeService) -> None:
        self.answers: list[tuple[int, int]] = []
        self.sizes: list[int] = []
        self.metadata: list[dict[str, Any]] = []
        self.used: list[int] = []
        self.error: Exception | None = None
        self._fakes = fakes

    def write_with_metadata(self, batch: pa.RecordBatch, metadata: bytes) -> None:
        if self.error is not None:
            raise self.error
        self.metadata.append(json.loads(metadata))
        self.answers.append((self.metadata[-1]["batch_id"], batch.num_rows))
        self.sizes.append(pa.ipc.get_record_batch_size(batch) + len(metadata))
        self.used.append(self._fakes.held()["bytes"])


@pytest.fixture
def fakes(tiny_bundle: ModelBundle) -> Iterator[FakeService]:
    fakes = FakeService(tiny_bundle)
    yield fakes
    assert fakes.held() == NOTHING


def batch(num_rows: int) -> pa.RecordBatch:
    """Rows of one text, which take next to nothing on the wire."""
    codes = pa.array(np.zeros(num_rows, np.int8))
    return pa.record_batch({"text": pa.DictionaryArray.from_arrays(codes, pa.array(["a"]))}, SCHEMA)


def answer(fakes: FakeService, writer: Any, *batches: pa.RecordBatch, **options: Any) -> int:
    """Embeds batches; returns the bytes of one row's vector."""
    command = EmbedCommand.from_mapping({"dtype": "float32", "normalize": False, **options})
    with EmbedSession(fakes.service, EmbedCall(name="test", command=command)) as session:
        output = session.open_input(batches[0].schema)
        session.admit(bulk=True)
        answers_to = AnswerWriter(None, SimpleNamespace(begin=lambda *_, **__: None))
        answers_to.begin(output, CallCompression("none"))
        answers_to._writer = writer
        answers = Answers(session, command, answers_to, Caller(None))
        row = 0
        for number, one in enumerate(batches):
            session.submit_batch(one, number, row)
            row += one.num_rows
        session.end_input()
        answers.write_results("u")
        return session.spec.num_bytes


def test_parts_of_an_answer_and_the_answer_itself_count(
    fakes: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(fakes)
    kept: list[int] = []
    keep_bytes = EmbedSession.keep_bytes

    def note(session: EmbedSession, num_bytes: int) -> None:
        kept.append(num_bytes)
        keep_bytes(session, num_bytes)

    monkeypatch.setattr(EmbedSession, "keep_bytes", note)
    vector_bytes = answer(fakes, writer, batch(ROWS), batch(1), batch(ROWS))
    assert 2 <= max(kept) // (ROWS * vector_bytes) <= 4
    assert kept[-1] == 0
    assert writer.answers == [(0, ROWS), (1, 1), (2, ROWS)]
    assert writer.used[0] >= 2 * ROWS * vector_bytes


def test_an_answer_that_would_take_too_much_is_refused(fakes: FakeService) -> None:
    most = fakes.budget.max_row_bytes
    fakes.budget.max_row_bytes = 1000
    with pytest.raises(BatchTooLargeError, match="500 bytes"):
        answer(fakes, Writer(fakes), batch(ROWS), answer_bytes=0)
    fakes.budget.max_row_bytes = most


def test_a_batch_whose_answer_would_take_too_much_is_refused_at_receipt() -> None:
    spec = SimpleNamespace(output="dense", num_bytes=1536)
    spec.chunking = None
    session: Any = SimpleNamespace(spec=spec, max_kept_bytes=2 * 1536 * 100)
    answers = Answers(session, EmbedCommand(answer_bytes=0), MagicMock(), MagicMock())
    answers.check_size(100)
    with pytest.raises(BatchTooLargeError, match="101 rows"):
        answers.check_size(101)
    Answers(session, EmbedCommand(), MagicMock(), MagicMock()).check_size(101)


def test_such_a_batch_is_refused_before_it_is_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[int] = []
    session = MagicMock()
    session.__enter__.return_value = session
    session.spec = SimpleNamespace(output="dense", num_bytes=1536, chunking=None)
    session.max_kept_bytes = 2 * 1536 * 100
    session.submit_batch = lambda batch, *_, **__: submitted.append(batch.num_rows)
    session.results.return_value = iter(())
    monkeypatch.setattr("fletcher.flight.exchange.EmbedSession", lambda *_: session)
    chunks = [SimpleNamespace(data=batch(size), app_metadata=None) for size in (100, 101, 1)]
    reader = SimpleNamespace(schema=SCHEMA, read_chunk=lambda: chunks.pop(0))
    context = SimpleNamespace(is_cancelled=lambda: False, get_middleware=lambda _: None)
    context.peer = lambda: "ipv4:127.0.0.1:1"
    with pytest.raises(BatchTooLargeError, match="101 rows"):
        exchange(MagicMock(), EmbedCommand(answer_bytes=0), Caller(context), reader, MagicMock())
    assert submitted == [100]
    session.end_input.assert_called_once_with()


def test_a_client_that_is_gone_is_no_failure_of_the_server(fakes: FakeService) -> None:
    writer = Writer(fakes)
    writer.error = pa.ArrowInvalid("the stream was reset")
    with pytest.raises(CancelledError, match="gone"):
        answer(fakes, writer, batch(ROWS))


def texts(*values: str | None) -> pa.RecordBatch:
    return pa.record_batch({"text": pa.array(values, pa.utf8())})


@pytest.mark.parametrize("answer_bytes", [1, 700, 1500, 3000, 10_000])
def test_no_message_is_larger_than_was_asked_for(fakes: FakeService, answer_bytes: int) -> None:
    writer = Writer(fakes)
    wide = texts(*(["a"] * 5), None, "b", *(["c " * 450] if answer_bytes > 1500 else []), None)
    asked = {"answer_bytes": answer_bytes, "include_text": True}
    answer(fakes, writer, texts("a", "b"), wide, texts(), texts("c"), **asked)
    rows: dict[int, int] = {}
    row = 0
    for (number, num_rows), size, metadata in zip(
        writer.answers, writer.sizes, writer.metadata, strict=True
    ):
        assert size <= answer_bytes or num_rows <= 1
        assert metadata["row_first"] == row
        last = row + num_rows
        assert all(row <= error["row"] < last for error in metadata["errors"])
        rows[number] = rows.get(number, 0) + num_rows
        assert metadata["last"] == (rows[number] == {0: 2, 1: wide.num_rows, 2: 0, 3: 1}[number])
        row = last
    assert row == 3 + wide.num_rows
    found = [error["row"] for metadata in writer.metadata for error in metadata["errors"]]

    assert found == [2 + place for place, one in enumerate(wide["text"]) if not one.is_valid]


def test_a_batch_has_one_answer_if_the_client_asks_for_it(fakes: FakeService) -> None:
    writer = Writer(fakes)
    answer(fakes, writer, batch(ROWS), batch(1), answer_bytes=0)
    assert writer.answers == [(0, ROWS), (1, 1)]
    assert [one["last"] for one in writer.metadata] == [True, True]


def test_a_failure_is_a_message_that_every_client_can_read() -> None:
    # Rust and Go cannot read a message without a batch.
    for begun in (True, False):
        sent: list[Any] = []
        flight_writer = SimpleNamespace(
            begin=lambda schema, **_: sent.append(schema),  # noqa: B023
            write_with_metadata=lambda *message: sent.append(message),  # noqa: B023
        )
        context = SimpleNamespace(is_cancelled=lambda: True)
        with pytest.raises(FlightError), AnswerWriter(context, flight_writer) as writer:
            if begun:
                writer.begin(SCHEMA, CallCompression("none"))
            raise to_flight_error(CancelledError("no more"))
        schema, (nothing, body) = sent
        assert schema == nothing.schema == (SCHEMA if begun else pa.schema([]))
        assert nothing.num_rows == 0
        assert json.loads(body)["code"] == "cancelled"
