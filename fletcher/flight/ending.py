"""How a DoExchange call writes to its client, and how it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import pyarrow as pa
from pyarrow import flight

# A client takes a millisecond or two to leave; one that does not listen waits this long in vain.
_LEAVE_S = 0.05


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Writing to a client fails in one way only: it is gone.

    Raises:
        FlightCancelledError: For whatever kind of error pyarrow makes of that.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise flight.FlightCancelledError(f"the client is gone: {str(error)[:200]}") from None


class Ending(contextlib.AbstractContextManager["Ending"]):
    """What an exchange ends with, said in a message of its own before the call ends.

    A client in which one thread reads while another writes cannot take the end of a call in the
    midst of a write: gRPC forbids what pyarrow does then, and aborts the process. Whoever knows
    from a message that the call has failed cancels it, which is safe: it is given the time.
    """

    def __init__(self, context: Any, writer: Any) -> None:
        self._context = context
        self._writer = writer
        self._told = False

    def tell(self, error: flight.FlightError) -> None:
        """Sends the failure as JSON, once; nothing where the client is gone."""
        if error.extra_info and not self._told:
            self._told = True
            with contextlib.suppress(flight.FlightError, pa.ArrowException, OSError):
                self._writer.write_metadata(error.extra_info)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, flight.FlightError):
            self.tell(error)
            deadline = time.monotonic() + _LEAVE_S
            while not self._context.is_cancelled() and time.monotonic() < deadline:
                time.sleep(_LEAVE_S / 25)
