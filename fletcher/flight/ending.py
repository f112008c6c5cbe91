"""Writing to the client of a DoExchange call, and telling it of a failure."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import flight

# A client takes a millisecond or two to cancel its call.
_CANCEL_WAIT_S = 0.05


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Treat every failure of a write as a client that is gone.

    Raises:
        FlightCancelledError: A write failed; pyarrow has several errors for that.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise flight.FlightCancelledError(f"the client is gone: {str(error)[:200]}") from None


class Ending(contextlib.AbstractContextManager["Ending"]):
    """Message that tells a client of its exchange's failure before the call ends.

    A call that ends while one thread of the client writes and another one reads aborts the client's
    process: pyarrow then does what gRPC forbids. A client that learns of the failure from a message
    cancels the call instead, which is safe; the call waits a moment for that.
    """

    def __init__(self, context: Any, writer: Any) -> None:
        self._context = context
        self._writer = writer
        self._sent = False

    def send_failure(self, error: flight.FlightError) -> None:
        """Send the failure as JSON, at most once; do nothing if the client is gone."""
        if error.extra_info and not self._sent:
            self._sent = True
            with contextlib.suppress(flight.FlightError, pa.ArrowException, OSError):
                self._writer.write_metadata(error.extra_info)

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, flight.FlightError):
            self.send_failure(error)
            deadline = time.monotonic() + _CANCEL_WAIT_S
            while not self._context.is_cancelled() and time.monotonic() < deadline:
                time.sleep(_CANCEL_WAIT_S / 25)
