"""Stream of one client call: takes texts and returns vectors in the same order."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fletcher.core.batches import Carry, EmbeddingBatch, Priority, TextBatch, TokenBatch
from fletcher.errors import DrainingError, FletcherError, InternalError, OverloadedError
from fletcher.pipeline.memory_budget import Allowance
from fletcher.telemetry.tracing import Span
from fletcher.util.insist import insist

log = logging.getLogger(__name__)

_RETRY_MS = 5000


def as_fletcher_error(error: Exception) -> FletcherError:
    """Returns a FletcherError as it is, and any other error as an InternalError.

    The InternalError tells the client only the type of the error.
    """
    if isinstance(error, FletcherError):
        return error
    return InternalError(f"{type(error).__name__} while working on this batch; the log has more")


def unexpected_failure() -> OverloadedError:
    """Error for a client after an error of an unknown kind, such as a lack of memory."""
    return OverloadedError(
        "the server failed on this call in an unexpected way, and its log has the cause; try again",
        retry_after_ms=_RETRY_MS,
    )


def end_calls(tickets: Iterable[StreamTicket], error: BaseException, what: str) -> None:
    """End the calls of tickets whose work failed in an unexpected way. Never raises.

    No row is reported as failed: the client sends the rows without an answer again. `what` says in
    the log what could not be done.
    """
    with contextlib.suppress(BaseException):
        log.error("%s", what, exc_info=error)
    for ticket in tickets:
        insist(functools.partial(ticket.stream.close, unexpected_failure()), what)


@dataclass(slots=True, eq=False)
class Seam:
    """State between two consecutive parts of a text.

    A seam refers to no ticket but the waiting one. So a text whose next part arrives late takes no
    memory beyond its seam.

    Attributes:
        carry: State of tokenization after the first part, or the error of that part. None: the
            first part is not tokenized yet.
        follower: Ticket of the second part, while it waits for `carry`.
    """

    carry: Carry | FletcherError | None = None
    follower: StreamTicket | None = None


@dataclass(slots=True, eq=False)
class StreamTicket:
    """A TextBatch in the pipeline, and its state.

    Attributes:
        context: The caller's object, handed back with the result.
        num_bytes: Bytes of the stream's allowance that the ticket holds until they are released.
        result: The vectors of all texts, or the error of the ticket; None until then.
        complete: Adds the vectors that the cache had to the vectors of `texts`.
        seam: State for the next part of the ticket's text; None: the text ends with this ticket.
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
        """Takes the tokens or an error, and lets the next part of the text proceed."""
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
        embeddings: The vectors, or one error for all of the texts.
        num_bytes: Bytes to release once the vectors have left the server.
    """

    context: Any
    embeddings: EmbeddingBatch | FletcherError
    num_bytes: int


class EmbedStream:
    """Texts of one call and their results.

    The caller releases the bytes of each result in `allowance`. Call `submit` and `end` on one
    thread, and `results` on the same thread or one other thread. All other methods are thread-safe.

    Args:
        on_close: Called once the stream is closed; drops what others hold of its tickets.
    """

    def __init__(
        self,
        allowance: Allowance,
        enqueue: Callable[[StreamTicket], None],
        trace: Span | None = None,
        on_close: Callable[[EmbedStream], None] = lambda _stream: None,
    ) -> None:
        self.trace = trace
        self.allowance = allowance
        self._enqueue = enqueue
        self._on_close = on_close
        self._tickets: deque[StreamTicket] = deque()
        self._ended = False
        self.closed = False
        self._dropped = False  # whether `on_close` was called
        # Set if the stream was closed before all results were read.
        self._cut_off: FletcherError | None = None
        self._seam: Seam | None = None  # of the text that was submitted last
        self._work: Callable[[], None] | None = None  # for the thread in `results`
        self._changed = threading.Condition()

    def submit(
        self, texts: TextBatch, context: Any, *, num_bytes: int, priority: Priority = "bulk"
    ) -> None:
        """Submits texts; blocks while the stream holds as much memory as it may.

        Args:
            texts: The texts, possibly none. Submit the parts of one text one after the other; only
                batches without texts may be submitted between them.
            num_bytes: Memory that the submission holds until the caller releases it.

        Raises:
            FletcherError: The stream was closed: the error given to `close`, or a DrainingError.
        """
        self.allowance.acquire(num_bytes, bulk=priority == "bulk")
        try:
            self._add_ticket(StreamTicket(self, texts, context, num_bytes, priority))
        except BaseException as error:  # else `results` would wait for a ticket that nobody has
            self.close(error if isinstance(error, FletcherError) else unexpected_failure())
            raise

    def _add_ticket(self, ticket: StreamTicket) -> None:
        texts, before = ticket.texts, None
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
        """Declares the input complete: `results` ends after the last result."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def results(self) -> Iterator[Result]:
        """Yields results in the order of submission; ends after the last one after `end`.

        Raises:
            FletcherError: The stream was closed before all results were yielded: the error given
                to `close`, or a DrainingError.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work or self._head_settled())
                work, self._work = self._work, None
            if work is not None:
                work()
                continue
            with self._changed:
                if self._cut_off is not None:
                    raise self._cut_off
                if not self._tickets:
                    return
                ticket = self._tickets.popleft()
            assert ticket.result is not None
            result = Result(ticket.context, ticket.result, ticket.num_bytes)
            del ticket  # frees the ticket's memory while this thread waits for the next one
            yield result
            del result

    def run_on_waiting_thread(self, work: Callable[[], None]) -> bool:
        """Runs `work` on the thread that reads `results`, if `work` alone unblocks it.

        A thread that is blocked in `results` runs `work` immediately. Otherwise the thread runs
        `work` when it asks for its next result. That delays no result, because results leave in
        order.

        Args:
            work: Finishes the only waiting ticket. Must not raise.

        Returns:
            Whether `work` will run. False if the stream does not have exactly one waiting ticket,
            or already has such work.
        """
        with self._changed:
            if len(self._tickets) != 1 or self._work is not None:
                return False
            self._work = work
            self._changed.notify_all()
            return True

    def close(self, error: FletcherError | None = None) -> None:
        """Drops all tickets, finished or not, and gives their memory back. Idempotent.

        `error`: raised by `submit` and `results` from now on; None: a DrainingError.
        """
        stopped = error or DrainingError("the server stopped", retry_after_ms=_RETRY_MS)
        with self._changed:
            self.closed = True
            if self._cut_off is None and (self._tickets or not self._ended):
                self._cut_off = stopped
            self._tickets.clear()
            self._changed.notify_all()
        self.allowance.close(stopped)
        if not self._dropped:
            self._on_close(self)
            self._dropped = True

    @property
    def idle(self) -> bool:
        """Whether all submitted texts have been yielded as results."""
        with self._changed:
            return not self._tickets

    def _go_on(self, seam: Seam, carry: Carry | FletcherError | None) -> None:
        """Lets the next part of a text proceed; an error fails all waiting parts."""
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
