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

from fletcher.core.command import EmbedCommand
from fletcher.errors import BatchTooLargeError, CancelledError
from fletcher.flight.exchange import _Answers, _check_size, _Writer, exchange
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.serving.callers import Caller
from fletcher.serving.session import EmbedCall, EmbedSession
from tests.doubles.service import NOTHING, FakeService

SCHEMA = pa.schema({"text": pa.dictionary(pa.int8(), pa.utf8())})
ROWS = 3 * 4  # three slices


class Writer:
    """Flight's writer; keeps answers, and what the budget says while each is written."""

    def __init__(self, fakes: FakeService) -> None:
        self.answers: list[tuple[int, int]] = []
        self.used: list[int] = []
        self.error: Exception | None = None
        self._fakes = fakes

    def write_with_metadata(self, batch: pa.RecordBatch, metadata: bytes) -> None:
        if self.error is not None:
            raise self.error
        self.answers.append((json.loads(metadata)["batch_id"], batch.num_rows))
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


def answer(fakes: FakeService, writer: Any, *sizes: int) -> int:
    """Embeds batches; returns the bytes of one row's vector."""
    command = EmbedCommand(dtype="float32", normalize=False)
    with EmbedSession(fakes.service, EmbedCall(name="test", command=command)) as session:
        session.open_input(SCHEMA)
        session.admit(bulk=True)
        caller, writing_as = Caller(None), SimpleNamespace(record_write=lambda *_: None)
        ending: Any = None
        answers = _Answers(session, "u", _Writer(caller, writer, writing_as), ending)  # type: ignore
        for number, size in enumerate(sizes):
            session.submit_batch(batch(size), number, 0)
        session.end_input()
        answers.write_results()
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
    vector_bytes = answer(fakes, writer, ROWS, 1, ROWS)
    assert max(kept) // (ROWS * vector_bytes) == 2
    assert kept[-1] == 0
    assert writer.answers == [(0, ROWS), (1, 1), (2, ROWS)]
    assert writer.used[0] >= 2 * ROWS * vector_bytes


def test_an_answer_that_would_take_too_much_is_refused(fakes: FakeService) -> None:
    most = fakes.budget.max_row_bytes
    fakes.budget.max_row_bytes = 1000
    with pytest.raises(BatchTooLargeError, match="500 bytes"):
        answer(fakes, Writer(fakes), ROWS)
    fakes.budget.max_row_bytes = most


def test_a_batch_whose_answer_would_take_too_much_is_refused_at_receipt() -> None:
    spec = SimpleNamespace(output="dense", num_bytes=1536)
    session: Any = SimpleNamespace(spec=spec, max_kept_bytes=2 * 1536 * 100)
    _check_size(100, session)
    with pytest.raises(BatchTooLargeError, match="101 rows"):
        _check_size(101, session)


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
        exchange(MagicMock(), EmbedCommand(), Caller(context), reader, MagicMock(), MagicMock())
    assert submitted == [100]
    session.end_input.assert_called_once_with()


def test_a_client_that_is_gone_is_no_failure_of_the_server(fakes: FakeService) -> None:
    writer = Writer(fakes)
    writer.error = pa.ArrowInvalid("the stream was reset")
    with pytest.raises(CancelledError, match="gone"):
        answer(fakes, writer, ROWS)
