"""Iterator over the vectors of a DoExchange, retried before the first answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pyarrow as pa

from fletcher.client.connection import Connection
from fletcher.client.exchange_call import ExchangeCall, ExchangeInput
from fletcher.client.messages import Message, RowError
from fletcher.core.command import EmbedCommand
from fletcher.errors import DeadlineExceededError, InternalError, UnavailableError
from fletcher.util.closing import Closing


class Exchange(Iterator[pa.RecordBatch], Closing):
    """An iterator over batches with vectors, one for each sent batch, in order.

    Batches larger than `TransferOptions.message_bytes` are sent in slices. The answers are joined
    again, so all vectors of a batch are held in memory. Batches without rows have no answer. With
    `EmbedCommand.continuous`, a batch is returned whenever chunks are complete instead. `close`, or
    the end of `with`, cancels the call. When the server fails, gRPC may drop answers that the
    server sent shortly before.

    If the server is overloaded, shutting down or unavailable before its first answer, the exchange
    starts again, up to `max_retries` times. For this, sent messages are kept in memory until the
    first answer, up to `window_bytes`.

    Attributes:
        errors: Errors of the rows with a null vector in the last returned batch, in the order of
            rows. At most the first 1,000 of each slice.
    """

    def __init__(
        self,
        connection: Connection,
        schema: pa.Schema,
        outgoing: Iterator[Message],
        options: EmbedCommand,
    ) -> None:
        self.errors: tuple[RowError, ...] = ()
        self._connection = connection
        self._outgoing = ExchangeInput(outgoing, connection.transfer.window_bytes)
        self._num_retries = 0
        self._changed = threading.Condition()
        self._closed = False
        self._start_call = partial(
            ExchangeCall, connection, options, schema, self._outgoing, self._changed
        )
        self._call = self._start_call()

    @property
    def schema(self) -> pa.Schema:
        """The output's schema; waits for the first answer."""
        self._wait(lambda: self._call.schema is not None)
        if self._call.schema is None:
            raise InternalError(f"{self._connection.address} ended the exchange without a schema")
        return self._call.schema

    def __next__(self) -> pa.RecordBatch:
        """The next batch.

        Raises:
            FletcherError: The server refused or failed; DeadlineExceededError if it owes an answer
                for `stall_timeout_s`.
            Exception: Any exception that the input raised.
        """
        if self._closed:
            raise StopIteration
        self._wait(lambda: bool(self._call.answers))
        with self._changed:
            answer = self._call.take_answer()
            if answer is not None:
                batch, self.errors = answer
                return batch
            failure = self._call.outcome()
        self.close()
        if failure is not None:
            raise failure
        raise StopIteration

    def close(self) -> None:
        """End the call, and cancel it if answers are left. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            call = self._call
            complete = call.finished_reading and call.all_sent and call.failure is None
        call.stop()
        call.end_call(self._connection.limits.close_s, cancel=not complete, leave_input=True)

    def _wait(self, done: Callable[[], bool]) -> None:
        """Wait until `done` returns true or the call has ended; raise the call's failure."""
        timeout_s = self._connection.transfer.stall_timeout_s
        while True:
            with self._changed:
                call = self._call
                if done() or (call.failure is None and call.finished_reading):
                    return
                if call.failure is None:
                    left = call.seconds_to_stall(timeout_s)
                    if left is None or left > 0:
                        self._changed.wait(timeout_s if left is None else left)
                        continue
                    call.failure = DeadlineExceededError(
                        f"{self._connection.address} has answered nothing for {timeout_s:g} s"
                    )
                failure = call.failure
            if not self._retry(failure):
                self.close()
                raise failure

    def _retry(self, failure: BaseException) -> bool:
        """Start another call after a pause; False: the failure is final."""
        limits = self._connection.limits
        with self._changed:
            left = self._num_retries < self._connection.transfer.max_retries
            can_retry = left and self._outgoing.can_rewind and not self._closed
        if not isinstance(failure, UnavailableError) or not can_retry:
            return False
        if not self._call.end_call(limits.leave_s, cancel=True):
            return False
        self._num_retries += 1
        delay_s = self._connection.retry_delay_s(self._num_retries, failure)
        with self._changed:
            closed = self._changed.wait_for(lambda: self._closed, delay_s)
            if closed or not self._outgoing.can_rewind:
                return False
            self._outgoing.rewind()
        call = self._start_call()
        with self._changed:
            self._call = call
            closed = self._closed
        if closed:
            call.stop()
            call.end_call(limits.close_s, cancel=True, leave_input=True)
        return not closed
