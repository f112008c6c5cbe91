"""DoPut: text in, vectors to the store, acknowledgements back."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fletcher.core.chunking import AGGREGATIONS
from fletcher.core.command import EmbedCommand
from fletcher.core.schema import output_schema
from fletcher.delivery.dedupe.prefilter import DedupePrefilter
from fletcher.delivery.groups import Rows
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.upload import Upload
from fletcher.errors import DrainingError, FletcherError, InvalidCommandError
from fletcher.flight.call import (
    Helper,
    Incoming,
    Trace,
    intake,
    read_messages,
    read_schema,
    started,
)
from fletcher.flight.messages import reported_id
from fletcher.pipeline.chunk_assembly import assembler
from fletcher.pipeline.input.intake import Intake
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.row_errors import ends_call
from fletcher.pipeline.stream import EmbedStream, Result, as_fletcher_error
from fletcher.serving.model_manager import ServedModel
from fletcher.serving.service import EmbedRequest, Service
from fletcher.stores.base import Store

log = logging.getLogger(__name__)

_POLL_S = 0.5


def put(
    service: Service, options: EmbedCommand, context: Any, reader: Any, writer: Any, trace: Trace
) -> None:
    """Answers one DoPut call."""
    if options.dataset is None:
        raise InvalidCommandError("`dataset` is missing", field="dataset")
    if options.continuous:
        raise InvalidCommandError(
            "`continuous` is true, but what is stored, counted and resumed are rows that are whole "
            "texts; use DoExchange, or leave it out",
            field="continuous",
            allowed=["false"],
        )
    _, store = service.delivery.store(options.store)
    if options.mode in ("upsert", "delta") and not store.capabilities.upsert:
        raise InvalidCommandError(
            f"`mode` is {options.mode}, which takes a store that replaces rows, such as `lance:`; "
            "this one takes append and overwrite",
            field="mode",
            allowed=["append", "overwrite"],
        )
    # A dataset has vectors of one model: an alias divides datasets, not their uploads and resumes.
    held = _model_of(store, options.dataset) if service.models.splits(options.model) else None
    with service.models.lease(
        options.model, key=options.dataset, held=held, given_up=context.is_cancelled
    ) as model:
        _put(service, model, store, options, context, reader, writer, trace)


def _put(
    service: Service,
    model: ServedModel,
    store: Store,
    options: EmbedCommand,
    context: Any,
    reader: Any,
    writer: Any,
    trace: Trace,
) -> None:
    request = service.resolve(model, options, dtypes=store.capabilities.dtypes)
    if request.spec.output not in store.capabilities.outputs:
        raise InvalidCommandError(
            f"`model` {model.bundle.name} gives {request.spec.output} vectors, which this store "
            "does not take; `lance:` and `parquet:` stores do, and DoExchange gives them back",
            field="model",
        )
    chunking = request.spec.chunking
    if chunking is not None and chunking.rows and store.capabilities.counts_groups:
        raise InvalidCommandError(
            f"`chunking` is {chunking}, but this store knows by the number of rows what it has, "
            "and a text is several; give each text one vector",
            field="chunking",
            allowed=[one for one in AGGREGATIONS if one != chunking.aggregation],
        )
    schema = read_schema(reader)
    source = intake(model, schema, request, carry_text=True, interactive=False)
    if not source.has_ids and (options.dedupe == "id" or options.mode == "delta"):
        asked = "`dedupe` is id" if options.dedupe == "id" else "`mode` is delta"
        raise InvalidCommandError(
            f"{asked}, but the input has no column `id`; name the ids' column in `id_column`",
            field="id_column",
        )
    output = output_schema(
        request.spec,
        id_type=source.id_type,
        carried=source.carried_fields,
        text=source.carry_text,
        metadata_column=source.has_metadata,
    )
    messages, first = started(read_messages(reader, context))  # who sends nothing takes no place
    if first is None and context.is_cancelled():
        return  # nor makes a dataset
    bulk = options.priority != "interactive"
    with service.admit(model, bulk=bulk), service.telemetry.span("do_put", trace) as span:
        upload, sink = service.delivery.open_upload(options, output)
        span.set(dataset=upload.dataset, upload_id=upload.upload_id)
        stream = model.embedder.open_stream(span)
        try:
            _Put(service, request, source, output, upload, sink, stream).run(messages, writer)
        finally:
            stream.close()
            service.delivery.close_upload(upload, sink)


def _model_of(store: Store, dataset: str) -> str | None:
    """`name@hash` of the model whose vectors a dataset has; None where that is not known."""
    info = store.dataset(dataset)
    name = (info.schema.metadata or {}).get(b"fletcher.model") if info is not None else None
    return None if name is None else name.decode()


class _Put:
    """One connection that feeds an upload.

    Three threads: the handler's reads and submits, `deliver` takes vectors to the dataset's lane,
    `acknowledge` tells the client what has become of its rows.
    """

    def __init__(
        self,
        service: Service,
        request: EmbedRequest,
        source: Intake,
        output: pa.Schema,
        upload: Upload,
        sink: DatasetSink,
        stream: EmbedStream,
    ) -> None:
        self._service = service
        self._options = request.options
        self._model = request.spec.model
        self._source = source
        self._upload = upload
        self._sink = sink
        self._stream = stream
        self._skip = (
            DedupePrefilter(sink.dedupe_index, upload).skip
            if upload.dedupe_by is not None
            else None
        )
        self._assembler = assembler(
            output,
            request.spec,
            upload.upload_id,
            whole_rows=True,
            max_kept_bytes=stream.max_row_bytes,
        )
        self._unacknowledged: deque[tuple[int, int, int]] = deque()
        self._new: list[tuple[int, int]] = []  # rows of the piece at hand that were not here yet
        self._ended = False
        self._client_gone = False

    def run(self, messages: Iterator[Incoming], writer: Any) -> None:
        deliver = Helper("put-deliver", self._deliver, self._abandon)
        acknowledge = Helper(
            "put-acknowledge", lambda: self._acknowledge(writer, deliver), self._abandon
        )
        draining: DrainingError | None = None
        refusal: Exception | None = None
        try:
            for message in messages:
                self._service.calls.check()
                if self._upload.failure is not None or deliver.error is not None:
                    break
                self._take(message)
        except DrainingError as error:
            draining = error
        except Exception as error:  # noqa: BLE001 - raised below, once accepted rows are safe
            refusal = error
        # Rows taken in go to the store whatever became of the connection.
        self._stream.end()
        try:
            deliver.join()
        except (FletcherError, flight.FlightError) as error:
            # Rows that got no further may be sent again, by whoever resumes this upload.
            self._upload.fail(as_fletcher_error(error))
        with self._upload.changed:
            self._ended = True
            self._upload.changed.notify_all()
        acknowledge.join()
        if refusal is not None:
            raise refusal
        if self._upload.failure is not None:
            raise self._upload.failure
        if draining is not None and not self._upload.complete:
            raise draining

    def _take(self, message: Incoming) -> None:
        """Submits what is new of a message, and notes its end marker."""
        batch = message.batch
        if batch is not None:
            num_rows = batch.num_rows
            self._service.telemetry.rows_received.add(num_rows)
            self._service.telemetry.bytes_received.add(batch.get_total_buffer_size())
            row_first, row_last = message.row_first, message.row_first + num_rows - 1
            # Cutting first checks the batch as a whole: a bad one is refused before it is claimed.
            row_slices = self._source.row_slices(
                batch, message.batch_id, row_first, keep=self._stream.keep, skip=self._skip
            )
            for row_slice in row_slices:
                if row_slice.num_rows:
                    self._submit(row_slice)
            if num_rows:
                with self._upload.changed:
                    self._unacknowledged.append((message.batch_id, row_first, row_last))
                    self._upload.changed.notify_all()
        if message.metadata.end and message.metadata.rows is not None:
            self._upload.announce_total(message.metadata.rows)

    def _submit(self, row_slice: RowSlice) -> None:
        if row_slice.part == 0:
            last = row_slice.row_first + row_slice.num_rows - 1
            self._new = self._upload.claim_rows(row_slice.row_first, last)
            num_known = row_slice.num_rows - sum(last - first + 1 for first, last in self._new)
            if num_known:
                self._service.telemetry.rows_deduplicated.add(num_known)
        new = self._new
        # Later pieces may need this one's dictionary values even where its rows are there already.
        if new or row_slice.new_values is not None:
            self._stream.submit(
                row_slice.texts,
                (row_slice, new),
                num_bytes=row_slice.num_bytes,
                priority=row_slice.priority,
            )

    def _deliver(self) -> None:
        for result in self._stream.results():
            self._hand_over(result)
            del result  # the next may be long in coming
        self._sink.flush()

    def _hand_over(self, result: Result) -> None:
        """Takes a piece's vectors to the dataset's lane."""
        row_slice, new = result.context
        output = self._assembler.assemble(row_slice, result.embeddings)
        if self._assembler.kept_bytes or output is None:
            self._stream.grow(self._assembler.kept_bytes)
        if output is None:
            self._stream.release(result.num_bytes)
            return
        row_bytes = self._stream.whole()
        errors, ids = output.errors, output.ids()
        if error := ends_call(errors, abort=self._options.on_error == "abort"):
            raise error
        if not new:
            self._stream.release(result.num_bytes, row_bytes)
        for index, (first, last) in enumerate(new):
            low, high = first - row_slice.row_first, last - row_slice.row_first
            failed = sorted(row for row in errors if low <= row <= high)
            for row in failed:
                self._service.telemetry.rows_failed.add()
                self._service.telemetry.errors.add(code=errors[row].code)
                self._upload.report_failed_row(
                    row_slice.row_first + row, reported_id(ids[row]), errors[row]
                )
            begin, end = output.place(low), output.place(high + 1)
            # The piece's memory is free once its last part is stored.
            left = (result.num_bytes, row_bytes) if index == len(new) - 1 else (0, 0)
            self._sink.submit_rows(
                Rows.from_batch(
                    self._upload,
                    output.batch.slice(begin, end - begin),
                    first,
                    tuple(output.place(row) - begin for row in failed),
                    lambda left=left: self._stream.release(*left),  # type: ignore[misc]
                    # Of rows that are several chunks, none is asked about.
                    tuple(row - low for row in row_slice.skipped.tolist() if low <= row <= high),
                    num_rows=last - first + 1,
                )
            )

    def _acknowledge(self, writer: Any, deliver: Helper) -> None:
        """Sends an acknowledgement whenever batches have settled, and the summary at the end.

        Acknowledgements are cumulative, so a slow reader gets fewer of them, not a longer queue.
        Where nobody reads any more, this still waits until all rows are settled: until then they
        count in the stream's allowance, and a drain lets them reach their store.
        """
        in_memory = self._options.durability == "memory"
        finished = False
        while not finished:
            with self._upload.changed:
                self._upload.changed.wait_for(lambda: self._news(in_memory), _POLL_S)
                finished = self._finished(deliver)
                settled = self._settled(in_memory)
            if settled is not None:
                batch_id, row_first, row_last = settled
                ack = {
                    "type": "ack",
                    "upload_id": self._upload.upload_id,
                    "batch_id": batch_id,
                    "row_first": row_first,
                    "row_last": row_last,
                    **self._upload.counts(),
                }
                self._write(writer, ack)
            if self._service.calls.draining.is_set():
                self._sink.flush()
        self._write(writer, self._upload.summary(self._model))

    def _news(self, in_memory: bool) -> bool:
        if self._upload.failure is not None:
            return True
        if self._ended and self._upload.in_flight == 0:
            return True
        if not self._unacknowledged:
            return False
        _, first, last = self._unacknowledged[0]
        return in_memory or self._upload.covers(first, last)

    def _finished(self, deliver: Helper) -> bool:
        if self._upload.failure is not None or deliver.error is not None:
            return True
        return self._ended and self._upload.in_flight == 0

    def _settled(self, in_memory: bool) -> tuple[int, int, int] | None:
        """The last of the oldest batches that are settled, and the rows since the last time."""
        row_first = self._unacknowledged[0][1] if self._unacknowledged else 0
        newest = None
        while self._unacknowledged:
            batch_id, first, last = self._unacknowledged[0]
            if not (in_memory or self._upload.covers(first, last)):
                break
            self._unacknowledged.popleft()
            newest = (batch_id, row_first, last)
        return newest

    def _write(self, writer: Any, message: dict[str, Any]) -> None:
        if self._client_gone:
            return
        try:
            writer.write(pa.py_buffer(json.dumps(message, ensure_ascii=False).encode()))
        except (flight.FlightError, pa.ArrowException, OSError) as error:
            log.info("upload %s: the client is gone (%s)", self._upload.upload_id, error)
            self._client_gone = True

    def _abandon(self, _: Exception) -> None:
        """A helper failed: free the handler if it waits for memory, the other one if it waits."""
        self._stream.close()
        with self._upload.changed:
            self._upload.changed.notify_all()
