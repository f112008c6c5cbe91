"""What DoPut and DoExchange have in common: reading batches, and threads that answer meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.core.command import EmbedCommand
from fletcher.errors import ColumnTypeError, FletcherError, InternalError, InvalidCommandError
from fletcher.flight.messages import BatchMetadata, parse_batch_metadata
from fletcher.pipeline.input.documents import DocumentIntake
from fletcher.pipeline.input.intake import Intake
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.stream import EmbedStream
from fletcher.serving.model_manager import ServedModel
from fletcher.serving.service import EmbedRequest

# The caller's trace, as `Telemetry.extract` found it in the headers.
Trace = Any

log = logging.getLogger(__name__)

# A client takes a millisecond or two to leave; one that does not listen waits this long in vain.
_LEAVE_S = 0.05


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message of a client.

    Attributes:
        batch: Its rows; None for a message of metadata only.
        batch_id: The client's number, or the count of batches so far.
        row_first: Offset of its first row in the upload.
        metadata: As sent.
    """

    batch: pa.RecordBatch | None
    batch_id: int
    row_first: int
    metadata: BatchMetadata


def read_messages(reader: Any, context: Any, *, continuous: bool = False) -> Iterator[Incoming]:
    """A client's messages until it ends or goes away.

    Args:
        reader: The call's.
        context: The call's.
        continuous: Rows are pieces of documents, so that a batch may end one.

    Raises:
        ColumnTypeError: A message that Arrow cannot decode.
        InvalidCommandError: Metadata that is none.
    """
    batch_id = row_next = 0
    while True:
        try:
            chunk = reader.read_chunk()
        except StopIteration:
            return
        except (flight.FlightError, OSError) as error:
            if isinstance(error, flight.FlightCancelledError) or context.is_cancelled():
                return
            if isinstance(error, flight.FlightError):
                raise
            raise _undecodable(error) from None
        except pa.ArrowException as error:
            if context.is_cancelled():
                return
            raise _undecodable(error) from None
        raw = chunk.app_metadata
        metadata = parse_batch_metadata(None if raw is None else raw.to_pybytes())
        if metadata.document_end and (chunk.data is None or not continuous):
            raise InvalidCommandError(
                "`document_end` came without a batch; send it with one, which may have no rows"
                if continuous
                else "`document_end` is given, but every row is a document by itself; set "
                "`continuous` in the command of a DoExchange, or leave it out",
                field="document_end",
            )
        batch_id = batch_id if metadata.batch_id is None else metadata.batch_id
        row_first = row_next if metadata.row_offset is None else metadata.row_offset
        yield Incoming(chunk.data, batch_id, row_first, metadata)
        if chunk.data is not None:
            batch_id, row_next = batch_id + 1, row_first + chunk.data.num_rows


def started(messages: Iterator[Incoming]) -> tuple[Iterator[Incoming], Incoming | None]:
    """The same messages, and the first; returns once that is there, or none comes."""
    first = next(messages, None)
    return (messages if first is None else itertools.chain([first], messages)), first


def read_schema(reader: Any) -> pa.Schema:
    """The input's schema.

    Raises:
        ColumnTypeError: The client sent none that Arrow can read.
    """
    try:
        schema = reader.schema
        _ = schema.names  # Arrow hands over names that are no UTF-8
    except flight.FlightError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ColumnTypeError(f"the stream's schema cannot be read: {str(error)[:300]}") from None
    return schema


def _undecodable(error: Exception) -> ColumnTypeError:
    return ColumnTypeError(f"a message cannot be decoded: {str(error)[:300]}")


def intake(
    model: ServedModel,
    schema: pa.Schema,
    request: EmbedRequest,
    *,
    carry_text: bool,
    interactive: bool,
) -> Intake:
    """The checks and cuts for one call's input."""
    options: EmbedCommand = request.options
    return (DocumentIntake if options.continuous else Intake)(
        schema,
        options,
        prompt=request.prompt,
        layers=request.layers,
        limits=model.limits,
        carry_text=options.include_text if options.include_text is not None else carry_text,
        small_is_interactive=interactive,
        chunking=request.spec.chunking,
        taken=request.taken,
        half=model.half(request.spec),
    )


def submit(stream: EmbedStream, row_slices: Iterable[RowSlice]) -> None:
    """Hands pieces in, each to come back with its vectors; blocks as `EmbedStream.submit` does."""
    for row_slice in row_slices:
        stream.submit(
            row_slice.texts, row_slice, num_bytes=row_slice.num_bytes, priority=row_slice.priority
        )


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


class Helper:
    """A thread that answers while the handler reads; its failure is the call's.

    Args:
        work: Runs in the thread.
        on_failure: Called in the thread with what the call will end with.
    """

    def __init__(
        self, name: str, work: Callable[[], None], on_failure: Callable[[Exception], None]
    ) -> None:
        self.error: FletcherError | flight.FlightError | None = None
        self._work = work
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits for the thread, and raises what it raised."""
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self._work()
        except (FletcherError, flight.FlightError) as error:
            self.error = error
        except Exception:
            log.exception("%s failed", self._thread.name)
            self.error = InternalError("the server failed on this call; its log has more")
        if self.error is not None:
            self._on_failure(self.error)
