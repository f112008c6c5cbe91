"""One call's way: results in order, and a thread that works while it waits."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fletcher.core.batches import EmbeddingBatch, TextBatch
from fletcher.errors import DrainingError
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.pipeline.stream import EmbedStream, StreamTicket

TEXTS = TextBatch(b"hi", np.array([0, 2]))
VECTORS = EmbeddingBatch(
    np.zeros((1, 2), np.float32), None, np.ones(1, np.int32), np.zeros(1, np.bool_)
)


class Reader:
    """A stream, its tickets, and a thread that iterates over its results."""

    def __init__(self) -> None:
        self.tickets: list[StreamTicket] = []
        self.stream = EmbedStream(MemoryBudget(1 << 20, 2).open_allowance(), self.tickets.append)
        self.contexts: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.go_on = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def submit(self, context: Any) -> StreamTicket:
        self.stream.submit(TEXTS, context, num_bytes=10)
        return self.tickets[-1]

    def _run(self) -> None:
        try:
            for result in self.stream.results():
                self.contexts.put((result.context, threading.current_thread()))
                assert self.go_on.acquire(timeout=30)
        except DrainingError as error:
            self.contexts.put((error.code, threading.current_thread()))


@pytest.fixture
def reader() -> Iterator[Reader]:
    one = Reader()
    yield one
    one.go_on.release()
    one.stream.close()
    one.thread.join(30)
    assert not one.thread.is_alive()


def test_the_thread_that_waits_makes_its_own_result(reader: Reader) -> None:
    for context in range(3):
        ticket = reader.submit(context)
        seen: list[threading.Thread] = []

        def work(ticket: StreamTicket = ticket, seen: list[threading.Thread] = seen) -> None:
            seen.append(threading.current_thread())
            ticket.finish(VECTORS)

        assert reader.stream.run_on_waiting_thread(work)
        assert reader.contexts.get(timeout=30) == (context, reader.thread)
        assert seen == [reader.thread]
        reader.go_on.release()


def test_work_runs_on_a_thread_only_if_it_waits_for_that_and_nothing_else(reader: Reader) -> None:
    never: Callable[[], None] = pytest.fail
    assert not reader.stream.run_on_waiting_thread(never)  # nothing is to come
    first = reader.submit("first")
    second = reader.submit("second")
    assert not reader.stream.run_on_waiting_thread(never)  # more is
    first.finish(VECTORS)
    assert reader.contexts.get(timeout=30)[0] == "first"
    # The thread writes an answer: the work is done when it comes back.
    done = threading.Event()

    def work() -> None:
        done.set()
        second.finish(VECTORS)

    assert reader.stream.run_on_waiting_thread(work)
    assert not reader.stream.run_on_waiting_thread(never)  # there is some already
    assert not done.is_set()
    reader.go_on.release()
    assert reader.contexts.get(timeout=30) == ("second", reader.thread)
    reader.go_on.release()


def test_work_handed_to_the_waiting_thread_is_done_though_the_stream_closes(reader: Reader) -> None:
    ticket = reader.submit("only")
    done = threading.Event()

    def work() -> None:
        reader.stream.close()
        ticket.finish(VECTORS)
        done.set()

    assert reader.stream.run_on_waiting_thread(work)
    assert done.wait(30)
    assert reader.contexts.get(timeout=30)[0] == "draining"


def test_a_thread_that_submits_and_then_reads_does_the_work_itself() -> None:
    tickets: list[StreamTicket] = []
    stream = EmbedStream(MemoryBudget(1 << 20, 2).open_allowance(), tickets.append)
    stream.submit(TEXTS, "only", num_bytes=10)
    assert stream.run_on_waiting_thread(lambda: tickets[0].finish(VECTORS))
    assert tickets[0].result is None
    stream.end()
    assert [result.context for result in stream.results()] == ["only"]
