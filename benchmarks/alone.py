"""Each stage of the server alone on the same texts, for `stages`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import flight

from benchmarks.bare import MAX_BATCH_ROWS, Timing
from benchmarks.hardware import cpu_seconds
from benchmarks.jobs import JobError
from benchmarks.pools import Held, through_pool
from benchmarks.receiving import intake
from benchmarks.serving import listening
from fletcher.config.delivery import DeliveryConfig
from fletcher.core.batches import EmbeddingBatch
from fletcher.core.command import EmbedCommand
from fletcher.core.schema import VectorSpec, output_schema
from fletcher.delivery.delivery import Delivery
from fletcher.delivery.groups import Rows
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.pipeline.assembly import Assembler
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.planner import plan
from fletcher.stores.address import open_store
from fletcher.telemetry.tracing import Telemetry
from fletcher.tokenization.worker import TokenizerConfig
from fletcher.workers.messages import WorkerSpec

# Full runs in a batch window, as in the server.
WINDOW_RUNS = 64
_RECEIVE = "from benchmarks.receiving import main; main()"
_STORED_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Load:
    """Input of every stage.

    Attributes:
        bundle: The model.
        batches: `id` and `text`, as a client sends them.
        row_slices: The same as they leave the intake.
        lengths: Tokens of each text.
    """

    bundle: ModelBundle
    batches: list[pa.RecordBatch]
    row_slices: list[RowSlice]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, bundle: ModelBundle, batches: list[pa.RecordBatch], lengths: npt.NDArray[np.int64]
    ) -> Load:
        """Cuts batches into row slices."""
        source = intake(batches[0].schema)
        row_slices: list[RowSlice] = []
        row_first = 0
        for index, batch in enumerate(batches):
            row_slices += source.row_slices(batch, index, row_first)
            row_first += batch.num_rows
        return cls(bundle, batches, row_slices, lengths)

    @property
    def num_rows(self) -> int:
        return sum(batch.num_rows for batch in self.batches)


def receive(load: Load) -> Timing:
    """Flight and intake: from a client's first write until the server has sliced every row."""
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        log = Path(scratch) / "log"
        with listening([_RECEIVE], log) as (address, pid), flight.connect(address) as client:
            _send(client, load.batches[:1])
            started, cpu_started = time.perf_counter(), time.process_time() + cpu_seconds([pid])
            num_rows = _send(client, load.batches)
            seconds = time.perf_counter() - started
            cpu = time.process_time() + cpu_seconds([pid]) - cpu_started
    if num_rows != load.num_rows:
        raise JobError(f"{num_rows} of {load.num_rows} rows arrived")
    return Timing(seconds, cpu)


def _send(client: flight.FlightClient, batches: Sequence[pa.RecordBatch]) -> int:
    """Number of rows that the server reports."""
    descriptor = flight.FlightDescriptor.for_path("bench")
    writer, reader = client.do_put(descriptor, batches[0].schema)
    for batch in batches:
        writer.write_batch(batch)
    writer.done_writing()
    answer = reader.read()
    writer.close()
    return int(answer.to_pybytes())


def tokenize(load: Load, num_workers: int, *, transfer: bool) -> Timing:
    """Tokenizer processes; `transfer` sends texts and tokens between processes, as in a server."""
    folder = str(load.bundle.folder)
    texts = tuple(row_slice.texts for row_slice in load.row_slices)
    factory, config = "fletcher.tokenization.worker:load", TokenizerConfig(folder)
    held = Held(folder, texts)
    specs = [
        WorkerSpec(f"tokenizer-{n}", factory, config)
        if transfer
        else WorkerSpec(f"tokenizer-{n}", "benchmarks.pools:hold", held)
        for n in range(num_workers)
    ]
    return through_pool(specs, texts if transfer else range(len(texts)))


def library(load: Load, num_workers: int) -> Timing:
    """The tokenizers library alone, in processes that have the texts."""
    held = Held(str(load.bundle.folder), tuple(row_slice.texts for row_slice in load.row_slices))
    specs = [
        WorkerSpec(f"tokenizer-{n}", "benchmarks.pools:hold_library", held)
        for n in range(num_workers)
    ]
    return through_pool(specs, range(len(held.texts)))


def plan_windows(load: Load, max_batch_tokens: int, num_runners: int) -> Timing:
    """Planning of all texts, window by window in order of arrival."""
    window = np.cumsum(load.lengths) // (WINDOW_RUNS * max_batch_tokens)
    cuts = np.flatnonzero(np.diff(window)) + 1
    windows = np.split(load.lengths.astype(np.int32), cuts)
    started, cpu_started = time.perf_counter(), time.process_time()
    for lengths in windows:
        plan(
            lengths,
            max_batch_tokens=max_batch_tokens,
            max_batch_rows=MAX_BATCH_ROWS,
            num_runners=num_runners,
        )
    return Timing(time.perf_counter() - started, time.process_time() - cpu_started)


def deliver(load: Load) -> Timing:
    """Vectors to output batches, in groups into LanceDB, until every row is settled there."""
    config = DeliveryConfig()
    bundle = load.bundle
    spec = VectorSpec(
        bundle.qualified_name,
        bundle.dim,
        "float16",
        bundle.num_layers,
        bundle.pooling,
        bundle.normalize,
    )
    schema = output_schema(spec, id_type=pa.int64(), text=True)
    outcomes = [_vectors(row_slice, bundle.dim) for row_slice in load.row_slices]
    with tempfile.TemporaryDirectory(prefix="fletcher-bench-") as scratch:
        store = open_store(f"lance:{scratch}")
        delivery = Delivery({"default": store}, config, Telemetry())
        try:
            started, cpu_started = time.perf_counter(), time.process_time()
            upload, sink = delivery.open_upload(
                EmbedCommand(dataset="bench", durability="store"), schema
            )
            assembler = Assembler(schema, spec, upload.upload_id)
            for row_slice, outcome in zip(load.row_slices, outcomes, strict=True):
                batch = assembler.assemble(row_slice, outcome).batch
                upload.claim_rows(row_slice.row_first, row_slice.row_first + row_slice.num_rows - 1)
                sink.submit_rows(
                    Rows.from_batch(upload, batch, row_slice.row_first, (), lambda: None)
                )
            sink.flush()
            with upload.changed:
                upload.changed.wait_for(
                    lambda: upload.in_flight == 0 or upload.failure is not None, _STORED_TIMEOUT_S
                )
            timing = Timing(time.perf_counter() - started, time.process_time() - cpu_started)
            delivery.close_upload(upload, sink)
            info = store.dataset("bench")
            if info is None or info.num_rows != load.num_rows:
                raise JobError(f"not all of {load.num_rows} rows were stored: {upload.failure}")
        finally:
            delivery.close()
    return timing


def _vectors(row_slice: RowSlice, dim: int) -> EmbeddingBatch:
    """Random vectors of length 1."""
    num_texts = row_slice.texts.num_texts
    vectors = np.random.default_rng(0).standard_normal((num_texts, dim), dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1).astype(np.float32)
    return EmbeddingBatch(
        vectors / norms[:, None],
        norms,
        np.full(num_texts, 2, np.int32),
        np.zeros(num_texts, np.bool_),
    )
