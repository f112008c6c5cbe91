"""The order of steps of a DoPut, with a session that only notes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Self

import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.core.command import EmbedCommand
from fletcher.errors import (
    CancelledError,
    DrainingError,
    FletcherError,
    InvalidCommandError,
    StoreUnavailableError,
)
from fletcher.flight.put import put
from fletcher.serving.callers import Caller

BATCH = pa.record_batch({"text": ["a", "b"]})
LEFT = "the client left"
END = {"end": True, "rows": 2}


class Session:
    """A `StoreSession`, whose `refusal` is the error of the second batch."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.upload = SimpleNamespace(
            failure=None,
            complete=False,
            announce_total=lambda num_rows: self.steps.append(f"total {num_rows}"),
        )
        self.refusal: FletcherError | None = None
        self.defect: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.steps.append("closed")

    def open_input(self, schema: pa.Schema) -> None:
        self.steps.append("opened")

    def admit(self) -> None:
        self.steps.append("admitted")

    def submit_batch(self, batch: pa.RecordBatch, batch_id: int, row_first: int) -> None:
        if batch_id and self.refusal is not None:
            raise self.refusal
        self.steps.append(f"rows from {row_first}")

    def abandon(self, error: FletcherError) -> None:
        assert isinstance(error, CancelledError)
        self.steps.append("abandoned")

    def end_input(self) -> None:
        self.steps.append("ended")
        if self.defect is not None:
            raise self.defect

    def fail(self) -> None:
        self.steps.append("failed")

    def close(self) -> None:
        self.steps.append("woken")

    def acknowledgements(self) -> Iterator[dict[str, Any]]:
        yield {"upload_id": "u", "type": "ack"}
        yield {"upload_id": "u", "type": "summary"}


class Call:
    """A call with batches of two rows, the last message with its metadata."""

    def __init__(self, num_batches: int, metadata: dict[str, Any] | None = None) -> None:
        self.schema = BATCH.schema
        self.left = False
        self.answers: list[str] = []
        self.drains = False
        self._chunks = [(BATCH, {}) for _ in range(num_batches)]
        if metadata is not None:
            self._chunks[-1:] = [(BATCH, metadata)]

    def read_chunk(self) -> Any:
        if not self._chunks:
            raise StopIteration
        data, metadata = self._chunks.pop(0)
        return SimpleNamespace(data=data, app_metadata=pa.py_buffer(json.dumps(metadata).encode()))

    def write(self, answer: pa.Buffer) -> None:
        if self.left:
            raise flight.FlightUnavailableError("gone")
        self.answers.append(json.loads(answer.to_pybytes())["type"])

    def is_cancelled(self) -> bool:
        return self.left

    def get_middleware(self, name: str) -> None:
        return None

    def peer_identity(self) -> bytes:
        return b""

    def check_draining(self) -> None:
        if self.drains:
            raise DrainingError("the server is being shut down")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    made = Session()
    monkeypatch.setattr("fletcher.flight.put.StoreSession", lambda *_: made)
    return made


def run(call: Call) -> None:
    service: Any = SimpleNamespace(admission=call)
    put(service, EmbedCommand(dataset="d"), Caller(call), call, call)


def test_the_total_is_announced_by_the_end_marker(session: Session) -> None:
    call = Call(2, END)
    session.upload.complete = True
    run(call)
    assert session.steps == [
        *("opened", "admitted", "rows from 0", "rows from 2", "total 2", "ended", "closed")
    ]
    assert call.answers == ["ack", "summary"]
    session.steps.clear()
    run(Call(1))
    assert session.steps == ["opened", "admitted", "rows from 0", "ended", "closed"]


def test_a_client_that_sends_nothing_and_leaves_is_not_admitted(session: Session) -> None:
    call = Call(0)
    call.left = True
    run(call)
    assert session.steps == ["opened", "closed"]


def test_the_rows_of_a_client_that_left_are_abandoned_before_the_input_ends(
    session: Session,
) -> None:
    call = Call(1, END)
    call.left = True
    with pytest.raises(CancelledError):
        run(call)
    steps = [one for one in session.steps if one != "woken"]
    assert steps[-3:] == ["abandoned", "ended", "closed"]
    assert not call.answers


@pytest.mark.parametrize("complete", [False, True])
def test_a_refusal_is_raised_once_the_rows_before_it_are_safe(
    session: Session, complete: bool
) -> None:
    call = Call(3, END)
    session.refusal = InvalidCommandError("not this", field="id")
    session.upload.complete = complete
    with pytest.raises(InvalidCommandError, match="not this"):
        run(call)
    assert session.steps == ["opened", "admitted", "rows from 0", "ended", "closed"]
    assert call.answers == ["ack", "summary"]


def test_a_server_that_drains_refuses_only_uploads_that_are_not_complete(session: Session) -> None:
    for complete in (True, False):
        call = Call(1, END)
        call.drains = True
        session.upload.complete = complete
        if complete:
            run(call)
        else:
            with pytest.raises(DrainingError):
                run(call)


def test_the_failure_of_an_upload_ends_its_call(session: Session) -> None:
    session.upload.failure = StoreUnavailableError("the store is out")
    with pytest.raises(StoreUnavailableError):
        run(Call(2, END))
    assert session.steps == ["opened", "admitted", "ended", "closed"]


def test_an_input_that_cannot_be_ended_ends_the_upload(session: Session) -> None:
    session.defect = MemoryError()
    with pytest.raises(MemoryError):
        run(Call(1, END))
    assert session.steps[-3:] == ["ended", "failed", "closed"]
