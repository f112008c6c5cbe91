"""DoExchange: text in, vectors back, batch for batch in the client's order."""

from __future__ import annotations

import json
import logging
import time
import uuid
from typing import Any

import pyarrow as pa

from fletcher.core.batches import EmbeddingBatch
from fletcher.core.command import EmbedCommand
from fletcher.core.schema import ELEMENT_TYPES, output_schema
from fletcher.errors import BatchTooLargeError, FletcherError, InvalidCommandError
from fletcher.flight.call import (
    Ending,
    Helper,
    Trace,
    intake,
    read_messages,
    read_schema,
    started,
    submit,
    writing,
)
from fletcher.flight.messages import MAX_REPORTED_ERRORS, row_errors
from fletcher.net.compression import CallCompression
from fletcher.net.flight_errors import to_flight_error
from fletcher.pipeline.assembly import Assembler, Output
from fletcher.pipeline.chunk_assembly import ChunkAssembler, assembler
from fletcher.pipeline.document_assembly import DocumentAssembler
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.row_errors import ends_call
from fletcher.pipeline.stream import EmbedStream
from fletcher.serving.model_manager import ServedModel
from fletcher.serving.service import Service

log = logging.getLogger(__name__)

_to_json = json.JSONEncoder(ensure_ascii=False).encode

# Arrow cannot send a batch of 2 GiB; half of that leaves room for the other columns.
_MAX_OUTPUT_BYTES = 1 << 30


def exchange(
    service: Service,
    options: EmbedCommand,
    context: Any,
    reader: Any,
    writer: Any,
    trace: Trace,
    ending: Ending,
) -> None:
    """Answers one DoExchange call."""
    if options.store is not None:
        raise InvalidCommandError(
            "`store` is given, but DoExchange never stores; use DoPut, or leave it out",
            field="store",
        )
    if options.dedupe != "off" or options.mode == "delta":
        field = "mode" if options.mode == "delta" else "dedupe"
        raise InvalidCommandError(
            f"`{field}` is {getattr(options, field)}, but DoExchange answers every row and knows "
            "no dataset; use DoPut, or leave it out",
            field=field,
        )
    key, given_up = options.upload_id or "", context.is_cancelled
    with service.models.lease(options.model, key=key, given_up=given_up) as model:
        _exchange(service, model, options, context, reader, writer, trace, ending)


def _exchange(
    service: Service,
    model: ServedModel,
    options: EmbedCommand,
    context: Any,
    reader: Any,
    writer: Any,
    trace: Trace,
    ending: Ending,
) -> None:
    request = service.resolve(model, options, dtypes=tuple(ELEMENT_TYPES))
    schema = read_schema(reader)
    source = intake(model, schema, request, carry_text=False, interactive=True)
    output = output_schema(
        request.spec,
        id_type=source.id_type,
        carried=source.carried_fields,
        text=source.carry_text,
        metadata_column=source.has_metadata,
    )
    upload_id = options.upload_id or uuid.uuid4().hex
    # Before the first batch, so that a client that waits for the schema need not send.
    writing_as = service.answers.for_call(context.peer(), output)
    writer.begin(output, options=writing_as.options)
    received = read_messages(reader, context, continuous=options.continuous)
    messages, first = started(received)  # who sends nothing takes no place
    if first is None and context.is_cancelled():
        return
    bulk = first is not None and first.batch is not None and source.is_bulk(first.batch)
    with service.admit(model, bulk=bulk), service.telemetry.span("do_exchange", trace) as span:
        stream = model.embedder.open_stream(span)
        try:
            if options.continuous:
                assembling: Assembler = DocumentAssembler(output, request.spec, upload_id)
            else:
                assembling = assembler(output, request.spec, upload_id, whole_rows=False)
            answers = _Answers(service, stream, assembling, writer, ending, options, writing_as)
            helper = Helper("exchange-writer", answers.run, answers.fail)
            # Of sparse and token vectors that is the most: what they really take is counted later.
            row_bytes = request.spec.num_bytes if request.spec.output == "dense" else 0
            refusal: Exception | None = None
            try:
                for message in messages:
                    service.calls.check()
                    batch = message.batch
                    if batch is None:
                        continue
                    if batch.num_rows * row_bytes > _MAX_OUTPUT_BYTES:
                        raise _too_large(batch.num_rows)
                    service.telemetry.rows_received.add(batch.num_rows)
                    service.telemetry.bytes_received.add(batch.get_total_buffer_size())
                    row_slices = source.row_slices(
                        batch,
                        message.batch_id,
                        message.row_first,
                        keep=stream.keep,
                        ends=message.metadata.document_end,
                    )
                    submit(stream, row_slices)
                if not context.is_cancelled():
                    submit(stream, source.rest())
            except Exception as error:  # noqa: BLE001 - raised once earlier batches are answered
                refusal = error
            if context.is_cancelled():
                stream.close()  # nobody waits: drop what is queued
            stream.end()
            helper.join()
            if refusal is not None:
                raise refusal
        finally:
            stream.close()


class _Answers:
    """Writes a stream's results back, joined to the batches they came from."""

    def __init__(
        self,
        service: Service,
        stream: EmbedStream,
        assembler: Assembler,
        writer: Any,
        ending: Ending,
        options: EmbedCommand,
        writing_as: CallCompression,
    ) -> None:
        self._writing_as = writing_as
        self._telemetry = service.telemetry
        self._stream = stream
        self._assembler = assembler
        self._writer = writer
        self._ending = ending
        self._abort = options.on_error == "abort"
        # Of these a batch may have any number: they leave piece by piece.
        self._chunk_rows = isinstance(assembler, ChunkAssembler)
        self._parts: list[pa.RecordBatch] = []
        self._parts_bytes = 0
        self._errors: list[dict[str, Any]] = []

    def run(self) -> None:
        for result in self._stream.results():
            self._take(result.context, result.embeddings)
            # A batch that is joined from pieces must not wait for its own memory (see the docs'
            # memory bound: an exchange may hold one output batch beside its allowance).
            self._stream.release(result.num_bytes)
            del result  # the next may be long in coming

    def fail(self, error: Exception) -> None:
        """Frees the handler if it waits for memory, and tells the client at once.

        The handler may be in a read that nothing but the client can end, and the call's own end
        would wait for that: a client that waits for its vectors would never hear.
        """
        self._stream.close()
        self._ending.tell(to_flight_error(error, log))

    def _take(self, row_slice: RowSlice, outcome: EmbeddingBatch | FletcherError) -> None:
        output = self._assembler.assemble(row_slice, outcome)
        if output is None:
            return
        errors = output.errors
        if errors:
            self._note(errors, output, row_slice.row_first)
        self._parts.append(output.batch)
        # Of columns that are there, these alone may be more than the message that they came in.
        for name in {"vector", "text"} & set(output.batch.schema.names):
            self._parts_bytes += output.batch.column(name).nbytes
        if self._parts_bytes > _MAX_OUTPUT_BYTES:
            raise _too_large(sum(part.num_rows for part in self._parts))
        if row_slice.last or (self._chunk_rows and output.batch.num_rows):
            whole = pa.concat_batches(self._parts) if len(self._parts) > 1 else self._parts[0]
            metadata: dict[str, Any] = {"batch_id": row_slice.batch_id, "errors": self._errors}
            if self._chunk_rows:
                metadata["last"] = row_slice.last
            self._parts, self._parts_bytes, self._errors = [], 0, []
            started_s = time.perf_counter()
            with writing():
                self._writer.write_with_metadata(whole, _to_json(metadata).encode())
            self._writing_as.record_write(whole, time.perf_counter() - started_s)

    def _note(self, errors: dict[int, FletcherError], output: Output, row_first: int) -> None:
        """Counts a piece's errors, and keeps them for the answer, unless one ends the call."""
        if ending := ends_call(errors, abort=self._abort):
            raise ending
        for error in errors.values():
            self._telemetry.rows_failed.add()
            self._telemetry.errors.add(code=error.code)
        limit = MAX_REPORTED_ERRORS - len(self._errors)
        self._errors += row_errors(errors, output.ids(), row_first=row_first, limit=limit)


def _too_large(num_rows: int) -> BatchTooLargeError:
    return BatchTooLargeError(
        f"{num_rows} rows of a batch make more than {_MAX_OUTPUT_BYTES} bytes of vectors and text; "
        "send smaller batches",
        allowed=[f"<= {_MAX_OUTPUT_BYTES} bytes"],
    )
