"""Stream of one client call: texts in, vectors out, in the same order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fletcher.core.batches import Carry, EmbeddingBatch, Priority, TextBatch, TokenBatch
from fletcher.errors import DrainingError, FletcherError, InternalError
from fletcher.pipeline.memory_budget import Allowance
from fletcher.telemetry.tracing import Span

_RETRY_MS = 5000


def as_fletcher_error(error: Exception) -> FletcherError:
    """Returns the error if it is one of ours, else an InternalError without details."""
    if isinstance(error, FletcherError):
        return error
    return InternalError(f"{type(error).__name__} while working on this batch; the log has more")


@dataclass(slots=True, eq=False)
class Seam:
    """State between two consecutive parts of a text.

    It refers to the waiting ticket only, so a text whose next part comes late takes no more memory
    than this.

    Attributes:
        carry: State of tokenization after the first of the two, or its error; None: not yet known.
        follower: Ticket of the second one, if it waits.
    """

    carry: Carry | FletcherError | None = None
    follower: StreamTicket | None = None


@dataclass(slots=True, eq=False)
class StreamTicket:
    """A TextBatch in the pipeline, and its state.

    Attributes:
        context: The caller's object, handed back with the result.
        num_bytes: Bytes of its stream's allowance that it holds until they are released.
        result: Set once all its vectors are there, or once it failed as a whole.
        complete: Adds cached vectors to those of `texts`.
        seam: State for the next part of its text; None: the text ends here.
    """

    stream: EmbedStream
    texts: TextBatch
    context: Any
    num_bytes: int
    priority: Priority
    tokens: TokenBatch | None = None
    result: EmbeddingBatch | FletcherError | None = None
    complete: Callable[[EmbeddingBatch | FletcherError], EmbeddingBatch | FletcherError] = (
        lambda result: result
    )
    seam: Seam | None = None

    def tokenized(self, tokens: TokenBatch | FletcherError) -> None:
        """Takes the tokens or their error, and lets the next part of the text proceed."""
        if isinstance(tokens, FletcherError):
            self.finish(tokens)
        else:
            self.tokens = tokens
        if self.seam is not None:
            left = tokens if isinstance(tokens, FletcherError) else tokens.carry
            self.stream._go_on(self.seam, left)

    def finish(self, result: EmbeddingBatch | FletcherError) -> None:
        """Records the result and wakes the thread that waits for it."""
        self.stream._finished(self, self.complete(result))


@dataclass(frozen=True, slots=True)
class Result:
    """Vectors of one submitted TextBatch.

    Attributes:
        embeddings: The vectors, or the error of all of them.
        num_bytes: Bytes to release once the data has left the server.
    """

    context: Any
    embeddings: EmbeddingBatch | FletcherError
    num_bytes: int


class EmbedStream:
    """Texts of one call and their results, whose bytes are released in `allowance`.

    `submit` and `end` are called on one thread, `results` on one thread (the same or another), all
    other methods on any thread.
    """

    def __init__(
        self,
        allowance: Allowance,
        enqueue: Callable[[StreamTicket], None],
        trace: Span | None = None,
    ) -> None:
        self.trace = trace
        self.allowance = allowance
        self._enqueue = enqueue
        self._tickets: deque[StreamTicket] = deque()
        self._ended = False
        self.closed = False
        self._cut_off = False  # closed before its end
        self._seam: Seam | None = None  # of the text that was submitted last
        self._work: Callable[[], None] | None = None  # for the thread in `results`
        self._changed = threading.Condition()

    def submit(
        self, texts: TextBatch, context: Any, *, num_bytes: int, priority: Priority = "bulk"
    ) -> None:
        """Submits texts; blocks while the stream holds as much memory as it may.

        Args:
            texts: The texts; there may be none. Parts of one text follow each other, with nothing
                but submissions of no texts between them.
            num_bytes: Memory that the submission holds until it is released.

        Raises:
            DrainingError: The stream was closed.
        """
        self.allowance.acquire(num_bytes, bulk=priority == "bulk")
        ticket = StreamTicket(self, texts, context, num_bytes, priority)
        before = None
        with self._changed:
            self._tickets.append(ticket)
            if texts.num_texts:
                before, self._seam = self._seam, Seam() if texts.continued else None
                ticket.seam = self._seam
            if before is not None:
                before.follower = ticket
        if before is None:
            self._enqueue(ticket)
        elif before.carry is not None:
            self._go_on(before, before.carry)

    def end(self) -> None:
        """Declares that nothing more is submitted: `results` ends after the last result."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def results(self) -> Iterator[Result]:
        """Yields results in the order of submission, until all are there after `end`.

        Raises:
            DrainingError: The stream was closed before that, and results are missing.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work or self._head_settled())
                work, self._work = self._work, None
            if work is not None:
                work()
                continue
            with self._changed:
                if self._cut_off:
                    raise DrainingError("the server stopped", retry_after_ms=_RETRY_MS)
                if not self._tickets:
                    return
                ticket = self._tickets.popleft()
            assert ticket.result is not None
            result = Result(ticket.context, ticket.result, ticket.num_bytes)
            del ticket  # frees its memory while the next one is awaited
            yield result
            del result

    def run_on_waiting_thread(self, work: Callable[[], None]) -> bool:
        """Runs `work` on the thread that reads `results`, if `work` alone unblocks it.

        The thread runs it at once if it is blocked there, else when it asks for its next result:
        no result could leave sooner, because results leave in order.

        Args:
            work: Gives the only ticket its result. Must not raise.

        Returns:
            False: `work` does not run; the thread waits for other tickets, too.
        """
        with self._changed:
            if len(self._tickets) != 1 or self._work is not None:
                return False
            self._work = work
            self._changed.notify_all()
            return True

    def close(self) -> None:
        """Drops everything, finished or not. Idempotent."""
        with self._changed:
            self._cut_off = self._cut_off or not self._ended or bool(self._tickets)
            self.closed = True
            self._tickets.clear()
            self._changed.notify_all()
        self.allowance.close()

    def _go_on(self, seam: Seam, carry: Carry | FletcherError | None) -> None:
        """Lets the next part of a text proceed; after an error, all waiting parts fail."""
        while True:
            with self._changed:
                seam.carry = carry
                follower, seam.follower = seam.follower, None
            if follower is None:
                return
            if not isinstance(carry, FletcherError):
                follower.texts = replace(follower.texts, carry=carry)
                self._enqueue(follower)
                return
            follower.finish(carry)
            if follower.seam is None:
                return
            seam = follower.seam

    def _head_settled(self) -> bool:
        if self.closed:
            return True
        if not self._tickets:
            return self._ended
        return self._tickets[0].result is not None

    def _finished(self, ticket: StreamTicket, result: EmbeddingBatch | FletcherError) -> None:
        with self._changed:
            if ticket.result is not None:
                raise InternalError("a ticket was finished twice")
            ticket.result = result
            if self._tickets and self._tickets[0] is ticket:
                self._changed.notify_all()
