"""Embedding work of one call, from its command to its last output batch.

A protocol adapter (`fletcher.flight.put`, `exchange` or `embed_action`) takes these steps:

    with EmbedSession(service, EmbedCall(name="do_exchange", command=command)) as session:
        output_schema = session.open_input(input_schema)
        session.admit(bulk=True)
        session.submit_batch(batch, batch_id, row_first)  # blocks if the stream's memory is used up
        session.end_input()
        for result in session.results(upload_id):  # on this thread or another
            ...

The session leases the model and resolves the command against it. It checks the input, cuts it into
row slices and opens a stream. It assembles vectors into output batches and accounts for their
memory. When the session is left, the lease, the stream and the memory are released, even if a step
failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from fletcher.config.model import OutputConfig
from fletcher.core.chunking import Chunking
from fletcher.core.command import EmbedCommand
from fletcher.core.schema import ELEMENT_TYPES, VectorSpec, output_schema
from fletcher.errors import DrainingError, FletcherError
from fletcher.models.bundle.bundle import NULL_PREFIX
from fletcher.pipeline.assembly import Assembler
from fletcher.pipeline.chunk_assembly import assembler
from fletcher.pipeline.document_assembly import DocumentAssembler
from fletcher.pipeline.input.column_types import check_readable
from fletcher.pipeline.input.documents import DocumentIntake
from fletcher.pipeline.input.intake import Intake, Skip, TextTreatment
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.prompts import prompt_tokens
from fletcher.pipeline.row_errors import ends_call
from fletcher.pipeline.stream import EmbedStream, Result
from fletcher.pipeline.vector_spec import check_late, vector_spec
from fletcher.serving.admission import Place
from fletcher.serving.background import BackgroundTask
from fletcher.serving.callers import Caller
from fletcher.serving.model_versions import ServedModel
from fletcher.serving.service import Service
from fletcher.serving.slice_result import RowRanges, SliceResult
from fletcher.telemetry.tracing import Span

# Returns the rows of a slice that this call embeds, as first and last offsets in the upload.
Claim = Callable[[RowSlice], RowRanges]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedCall:
    """Arguments of a session, set by its protocol adapter."""

    name: str  # name of the call's span: `do_put`, `do_exchange` or `embed`
    command: EmbedCommand
    dtypes: tuple[str, ...] = tuple(ELEMENT_TYPES)  # vector types that the destination takes
    include_text: bool = False  # return texts, unless the command says otherwise
    whole_rows: bool = False  # put all chunks of a text into one output batch
    small_is_interactive: bool = True  # batches of a few short rows overtake bulk work
    abort: bool = False  # any failed row ends the call, whatever the command says
    alias_key: str = ""  # calls with one key get the same model of an alias; empty: `upload_id`
    dataset_model: str | None = None  # `name@hash` to choose if it is in the alias
    trace: Any = None  # the caller's trace, from `Telemetry.extract`
    caller: Caller | None = None  # None: nobody who could leave


class EmbedSession(AbstractContextManager["EmbedSession"]):
    """Context of one call that embeds; its resources are released on exit.

    Entering leases the model and resolves the command. One thread calls `open_input`, `admit`,
    `submit_batch` and `end_input`, in this order. The same thread or another one iterates over
    `results`. Any thread may call `close`.

    Attributes:
        model: The leased model.
        spec: Dimensions, layers, type and norm of the call's vectors.
        intake: Checks and slices the input; set by `open_input`.

    Raises:
        FletcherError: On entering, if the model is unknown, cannot be loaded now, or cannot give
            such vectors.
    """

    model: ServedModel
    spec: VectorSpec
    intake: Intake
    _treatment: TextTreatment
    _output: pa.Schema
    _stream: EmbedStream = None  # type: ignore[assignment]  # until `admit`

    def __init__(self, service: Service, call: EmbedCall) -> None:
        self._place: Place | None = None
        self._counting: EmbedStream | None = None
        self._failure: FletcherError | None = None  # the caller left
        self._service = service
        self._call = call
        self._exits = ExitStack()
        self._ranges: RowRanges = []  # claimed rows of the current text, which may have parts

    def __enter__(self) -> EmbedSession:
        call, service = self._call, self._service
        with ExitStack() as exits:
            lease = service.models.lease(
                call.command.model,
                alias_key=call.alias_key or call.command.upload_id or "",
                dataset_model=call.dataset_model,
                is_cancelled=call.caller.is_cancelled if call.caller else lambda: False,
            )
            self.model = exits.enter_context(lease)
            if call.caller is not None:
                call.caller.bind(self)
            num_tokens = partial(self.model.embedder.num_tokens, on_open=self._open_count)
            self.spec, self._treatment = _resolve_command(
                self.model, call.command, call.dtypes, service.outputs, num_tokens
            )
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)

    def open_input(self, schema: pa.Schema) -> pa.Schema:
        """Check the input's schema, and return the output's schema.

        Raises:
            UnknownColumnError, ColumnTypeError, InvalidCommandError: The input lacks a column that
                the command names, or a column has the wrong type.
        """
        call, command = self._call, self._call.command
        check_readable(schema, command)
        kind = DocumentIntake if command.continuous else Intake
        text = command.include_text
        self.intake = intake = kind(
            schema,
            command,
            self.model.limits,
            self._treatment,
            carry_text=call.include_text if text is None else text,
            small_is_interactive=call.small_is_interactive,
        )
        self._output = output_schema(
            self.spec,
            id_type=intake.id_type,
            carried=intake.carried_fields,
            text=intake.carry_text,
            metadata_column=intake.has_metadata,
        )
        return self._output

    def admit(self, *, bulk: bool) -> Span:
        """Open a stream until the session is left, and return the call's span.

        Raises:
            OverloadedError, DrainingError: As `Admission.admit`.
        """
        service, embedder = self._service, self.model.embedder
        self._place = self._exits.enter_context(service.admission.admit(embedder, bulk=bulk))
        span = self._exits.enter_context(service.telemetry.span(self._call.name, self._call.trace))
        self._stream = embedder.open_stream(span)
        self._exits.callback(self._stream.close)
        if self._failure is not None:  # the caller left meanwhile
            self.abandon(self._failure)
        return span

    def submit_batch(
        self,
        batch: pa.RecordBatch,
        batch_id: int,
        row_first: int,
        *,
        document_end: bool = False,
        skip: Skip | None = None,
        claim: Claim | None = None,
    ) -> None:
        """Submit a received batch; block while the stream's memory is used up.

        Args:
            batch: The batch as received.
            batch_id: Number of the batch.
            row_first: Offset of the batch's first row in the call or upload.
            document_end: Whether the last row ends its document, for `continuous` commands.
            skip: Returns the rows of a slice that need no vector.
            claim: Claims rows of a slice before the slice is submitted. A slice without claimed
                rows has no result, unless later slices need its dictionary values.

        Raises:
            FletcherError: The batch is invalid, and nothing of it was submitted, or the stream was
                closed.
        """
        telemetry, keep = self._service.telemetry, self._stream.allowance.keep_table
        telemetry.rows_received.add(batch.num_rows)
        telemetry.bytes_received.add(batch.get_total_buffer_size())
        slices = self.intake.row_slices(
            batch, batch_id, row_first, keep=keep, skip=skip, ends=document_end
        )
        self._submit_slices(slices, claim)

    def submit_rest(self) -> None:
        """Submit the rest of a `continuous` document whose end was not marked."""
        self._submit_slices(self.intake.rest())

    def end_input(self) -> None:
        """End the input: `results` ends after the last submitted slice."""
        self._stream.end()

    def embed_batch(self, batch: pa.RecordBatch, upload_id: str) -> Iterator[SliceResult]:
        """Submit the call's only batch and yield its `results` on this thread.

        A batch of several slices is submitted on a second thread, because its last slice may fit
        into memory only after its first slice has left. The metric of received rows does not count
        the batch.
        """
        slices = list(self.intake.row_slices(batch, 0, 0, keep=self._stream.allowance.keep_table))

        def submit() -> None:
            self._submit_slices(slices)
            self.end_input()

        if len(slices) == 1:
            submit()
            yield from self.results(upload_id)
            return
        submitting = BackgroundTask(f"{self._call.name}-submit", submit, lambda _: self.close())
        try:
            yield from self.results(upload_id)
        except DrainingError:
            if submitting.error is not None:
                raise submitting.error from None
            raise

    def results(self, upload_id: str) -> Iterator[SliceResult]:
        """Yield results in the order of submission; end after `end_input`.

        Args:
            upload_id: Prefix of the ids that are made for rows without an id.

        Raises:
            DrainingError: The session was closed before its end.
            FletcherError: A row failed, and its error is retryable or failed rows end the call
                (`on_error: abort`).
        """
        assembling = self._assembler(upload_id)
        for embedded in self._stream.results():
            result = self._assemble(assembling, embedded)
            del embedded  # free its memory: the next one may take long
            if result is not None:
                yield result
                result.release_unheld()
            del result

    @property
    def max_kept_bytes(self) -> int:
        """Largest `num_bytes` that `keep_bytes` accepts."""
        return self._stream.allowance.max_row_bytes

    def keep_bytes(self, num_bytes: int) -> None:
        """Count memory of results that are kept beyond the next one; 0: nothing is kept.

        Call it on the thread of `results`, without `whole_rows`. It waits while other streams keep
        so much that there is no room.
        """
        self._stream.allowance.grow_row(num_bytes)

    def close(self) -> None:
        """Drop submitted rows and wake waiting threads. Thread-safe, idempotent."""
        self._stream.close()

    @property
    def idle(self) -> bool:
        """Whether all submitted rows have been yielded as results."""
        return self._stream is None or self._stream.idle

    def abandon(self, error: FletcherError) -> None:
        """Drop all work and give the call's place back; waiting threads get the error.

        Thread-safe, idempotent.
        """
        self._failure = error
        if self._counting is not None:
            self._counting.close(error)
        if self._place is not None and self._stream is not None:
            self._stream.close(error)
            self._place.give_back()

    def _open_count(self, stream: EmbedStream) -> None:
        """Note the stream in which a prompt's tokens are counted, before `admit`."""
        self._counting = stream
        if self._failure is not None:  # the caller left meanwhile
            stream.close(self._failure)

    def _submit_slices(self, slices: Iterable[RowSlice], claim: Claim | None = None) -> None:
        for row_slice in slices:
            ranges = None
            if claim is not None:
                if row_slice.part == 0:
                    self._ranges = claim(row_slice)
                ranges = self._ranges
                if not ranges and row_slice.new_values is None:
                    continue
            num_bytes, priority = row_slice.num_bytes, row_slice.priority
            context = (row_slice, ranges)
            self._stream.submit(row_slice.texts, context, num_bytes=num_bytes, priority=priority)

    def _assembler(self, upload_id: str) -> Assembler:
        if self._call.command.continuous:
            return DocumentAssembler(self._output, self.spec, upload_id)
        if not self._call.whole_rows:
            return assembler(self._output, self.spec, upload_id, whole_rows=False)
        most = self._stream.allowance.max_row_bytes
        return assembler(self._output, self.spec, upload_id, whole_rows=True, max_kept_bytes=most)

    def _assemble(self, assembling: Assembler, embedded: Result) -> SliceResult | None:
        """Result of a slice; None if the slice's text continues in the next slice."""
        allowance, num_bytes, row_bytes = self._stream.allowance, embedded.num_bytes, 0
        row_slice, ranges = embedded.context
        output = assembling.assemble(row_slice, embedded.embeddings)
        # Without `whole_rows`, results may exceed the allowance by one output batch.
        if self._call.whole_rows:
            if assembling.kept_bytes or output is None:
                allowance.grow_row(assembling.kept_bytes)
            if output is not None:
                row_bytes = allowance.complete_row()
        if output is None:
            allowance.release_bytes(num_bytes)
            return None
        if output.errors:
            self._count_errors(output.errors, row_slice.row_first, ranges)
        return SliceResult(
            row_slice, output, ranges, lambda: allowance.release_bytes(num_bytes, row_bytes)
        )

    def _count_errors(
        self, errors: dict[int, FletcherError], row_first: int, ranges: RowRanges | None
    ) -> None:
        """Count errors of claimed rows, or raise one that ends the call."""
        abort = self._call.abort or self._call.command.on_error == "abort"
        if error := ends_call(errors, abort=abort):
            raise error
        telemetry = self._service.telemetry
        for row, one in errors.items():
            offset = row_first + row
            if ranges is None or any(first <= offset <= last for first, last in ranges):
                telemetry.rows_failed.add()
                telemetry.errors.add(code=one.code)


def _resolve_command(
    served: ServedModel,
    command: EmbedCommand,
    dtypes: tuple[str, ...],
    rules: OutputConfig,
    num_tokens: Callable[[str], int],
) -> tuple[VectorSpec, TextTreatment]:
    """Resolve a command: choose every setting that it leaves open.

    Raises:
        DimensionMismatchError, InvalidCommandError: The model cannot give such vectors or chunks,
            or has no such prompt.
    """
    model = served.bundle
    spec = vector_spec(model, command, dtypes, rules)
    if served.is_null:
        # Such vectors must not get into a dataset of the model.
        spec = replace(spec, model=f"{NULL_PREFIX}{spec.model}")
    prompt = spec.prompt
    chunking = Chunking.from_text(command.chunking or "none")
    chunk_overhead = 0
    if chunking is not None:
        check_late(model, chunking, spec.layers)
    if prompt or chunking is not None:
        chunk_overhead = prompt_tokens(model, prompt, num_tokens)
        chunking = chunking and chunking.fitted(model.max_length, chunk_overhead)
        spec = replace(spec, chunking=chunking)
    # The last layer is always given as 0, so that all work for the last layer runs together.
    layers = 0 if spec.layers == model.num_layers else spec.layers
    half = served.gives_float16(spec)
    return spec, TextTreatment(prompt, layers, spec.chunking, chunk_overhead, half)
