"""`fletcher ingest --dry-run`: estimate of an ingest of which nothing is stored."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from fletcher.cli.progress import clock, human
from fletcher.cli.terminal import print_table, say
from fletcher.core.command import EmbedCommand
from fletcher.jobs.run import VECTOR_OPTIONS
from fletcher.readers.source import TextSource

if TYPE_CHECKING:
    from fletcher.client import Client

# Texts that are kept of all that are read, and the time for which they are embedded.
SAMPLE_ROWS = 20_000
SAMPLE_S = 15.0
# Most texts whose vectors are waited for. They fill the batch windows of a server.
_MAX_WAITING = 2048
_BATCH_ROWS = 64
# A longer text is counted as this many bytes for each token that the model reads. Most languages
# have fewer bytes a token, so that few texts are counted too short.
_BYTES_PER_TOKEN = 6
# Space of a stored row beside its text and vector: id, times, keys.
_ROW_BYTES = 40


@dataclass(slots=True)
class CountedInput:
    """Rows of an input, and a random sample of their texts.

    Attributes:
        num_rows: Number of rows with a text.
        num_null: Number of rows without a text.
        num_bytes: Bytes of all columns.
        size: Sum of the texts' bytes, of which long texts count only a part.
        texts: The sample.
    """

    max_bytes: int
    num_rows: int = 0
    num_null: int = 0
    num_bytes: int = 0
    size: int = 0
    texts: list[str] = field(default_factory=list)
    _chance: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311

    def take(self, batch: pa.RecordBatch, column: str) -> None:
        """Count a batch, and keep some of its texts."""
        texts = batch.column(column)
        self.num_bytes += batch.nbytes
        self.num_null += texts.null_count
        texts = texts.drop_null()
        sizes = pc.min_element_wise(pc.binary_length(texts), self.max_bytes)
        self.size += pc.sum(sizes).as_py() or 0
        for place in range(len(texts)):
            # Reservoir sampling: each text is in the sample with the same chance.
            self.num_rows += 1
            if len(self.texts) < SAMPLE_ROWS:
                self.texts.append(texts[place].as_py())
            elif (at := self._chance.randrange(self.num_rows)) < SAMPLE_ROWS:
                self.texts[at] = texts[place].as_py()

    def shuffle(self) -> None:
        """Put the sample in random order."""
        self._chance.shuffle(self.texts)


@dataclass(frozen=True, slots=True)
class EmbeddedSample:
    """A sample that was embedded.

    Attributes:
        num_rows: Number of texts.
        size: As in `CountedInput`.
        num_tokens: Tokens that the model read.
        num_truncated: Texts that are longer than the model reads.
        seconds: Time that embedding took.
        vector_bytes: Bytes of all vectors.
    """

    num_rows: int
    size: int
    num_tokens: int
    num_truncated: int
    seconds: float
    vector_bytes: int


def estimate(client: Client, source: TextSource, options: EmbedCommand) -> dict[str, Any]:
    """Read all rows, embed a sample of them, and estimate the whole.

    Nothing is stored.

    Raises:
        FletcherError: A file cannot be read, or the server refuses or fails.
    """
    from fletcher.client.prompts import served_model

    max_length = int(served_model(client, options.model)["max_length"])
    counted = CountedInput(max_length * _BYTES_PER_TOKEN)
    for batch in source.batches():
        counted.take(batch, source.selection.text_column)
    counted.shuffle()
    embedded = _embed(client, counted, options)
    share = counted.size / embedded.size if embedded.size else 0.0
    rows_share = counted.num_rows / embedded.num_rows if embedded.num_rows else 0.0
    return {
        "rows": counted.num_rows + counted.num_null,
        "rows_without_text": counted.num_null,
        "tokens": round(embedded.num_tokens * share),
        "truncated_share": embedded.num_truncated / max(embedded.num_rows, 1),
        "seconds": round(embedded.seconds * share, 1),
        "bytes_stored": round(
            counted.num_bytes + embedded.vector_bytes * rows_share + _ROW_BYTES * counted.num_rows
        ),
        "sample_rows": embedded.num_rows,
    }


def _embed(client: Client, counted: CountedInput, options: EmbedCommand) -> EmbeddedSample:
    """Embed texts of the sample for some seconds."""
    vectors = {name: getattr(options, name) for name in VECTOR_OPTIONS}
    options = EmbedCommand(model=options.model, priority="bulk", **vectors)
    texts = counted.texts
    if not texts:
        return EmbeddedSample(0, 0, 0, 0, 0.0, 0)
    _run(client, texts[:_BATCH_ROWS], options)  # warms up
    started = time.monotonic()
    found = _run(client, texts, options, until=started + SAMPLE_S)
    seconds = time.monotonic() - started
    num_rows = sum(one.num_rows for one in found)
    sizes = pc.min_element_wise(pc.binary_length(pa.array(texts[:num_rows])), counted.max_bytes)
    return EmbeddedSample(
        num_rows,
        pc.sum(sizes).as_py(),
        sum(pc.sum(one.column("token_count")).as_py() or 0 for one in found),
        sum(one.column("truncated").true_count for one in found),
        seconds,
        sum(one.column("vector").nbytes for one in found),
    )


def _run(
    client: Client, texts: Sequence[str], options: EmbedCommand, until: float | None = None
) -> list[pa.RecordBatch]:
    """Embed texts until a time (`time.monotonic`), and return their vectors."""
    room, ended = threading.Semaphore(_MAX_WAITING // _BATCH_ROWS), threading.Event()

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, len(texts), _BATCH_ROWS):
            room.acquire()
            if ended.is_set() or (until is not None and time.monotonic() > until):
                return
            part = pa.array(texts[first : first + _BATCH_ROWS], pa.utf8())
            yield pa.RecordBatch.from_arrays([part], names=["text"])

    found = []
    reader = pa.RecordBatchReader.from_batches(pa.schema({"text": pa.utf8()}), batches())
    with client.exchange(reader, options) as exchange:
        try:
            for batch in exchange:
                found.append(batch.select(["vector", "token_count", "truncated"]))
                room.release()
        finally:
            ended.set()
            room.release()  # after an error the thread that sends must not wait for ever
    return found


def drifts(source: TextSource) -> list[str]:
    """Columns whose types differ between files, with the types that are stored."""
    found = []
    schemas = source.schemas
    for column in source.plain_schema:
        kinds: dict[str, str] = {}
        for schema, where in schemas:
            if column.name in schema.names:
                kinds.setdefault(str(schema.field(column.name).type), where)
        if len(kinds) > 1:
            listed = ", ".join(f"{kind} in {where}" for kind, where in kinds.items())
            found.append(f"column `{column.name}` is {listed}; it is stored as {column.type}")
    return found


def print_estimate(report: dict[str, Any]) -> None:
    """Print an estimate for people."""
    for line in report["drifts"]:
        say(f"fletcher ingest: {line}")
    rows = [
        ("files", f"{report['files']:,} to read, {report['files_known']:,} stored before"),
        ("rows", f"{report['rows']:,}, {report['rows_known']:,} stored before"),
        ("rows without a text", f"{report['rows_without_text']:,}"),
        ("tokens", f"about {human(report['tokens'])}"),
        ("texts cut at the model's length", f"about {report['truncated_share']:.1%}"),
        ("time", f"about {clock(report['seconds'])}"),
        ("disk", f"about {human(report['bytes_stored'])}B"),
    ]
    if report["cost"] is not None:
        rows.append(("cost", f"about {report['cost']:,.2f}"))
    if report["rows_to_delete"]:
        rows.append(("former rows to delete", f"{report['rows_to_delete']:,}"))
    rows.append(("sample", f"{report['sample_rows']:,} texts; nothing was stored"))
    print_table(rows)
