"""Assembly of output batches whose rows are chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.core.batches import BoolArray, Chunks, EmbeddingBatch, Int64Array
from fletcher.core.schema import CHUNK_FIELDS, VectorSpec, vector_columns
from fletcher.errors import FletcherError, RowTooLargeError
from fletcher.pipeline.assembly import Assembler, Output
from fletcher.pipeline.input.arrays import large_utf8, text_offsets
from fletcher.pipeline.input.row_slice import RowSlice

# Most bytes of one row's chunks that are kept until the row is complete: vectors, ranges and texts.
_MAX_KEPT_BYTES = 256 << 20


def assembler(
    schema: pa.Schema,
    spec: VectorSpec,
    upload_id: str,
    *,
    whole_rows: bool,
    max_kept_bytes: int = _MAX_KEPT_BYTES,
) -> Assembler:
    """Returns the assembler of a call, which depends on whether its rows are chunks.

    Arguments are those of `ChunkAssembler`.
    """
    if spec.chunking is None or not spec.chunking.rows:
        return Assembler(schema, spec, upload_id)
    return ChunkAssembler(
        schema, spec, upload_id, whole_rows=whole_rows, max_kept_bytes=max_kept_bytes
    )


class ChunkAssembler(Assembler):
    """Assembles one call's output batches, with a row for each chunk.

    A failed input row gives one output row without a vector.

    Args:
        whole_rows: Whether all chunks of a text leave together. If False, the chunks of each text
            part leave when that part is ready.
        max_kept_bytes: Most bytes that are kept of one text, at most 256 MiB. Its chunks count, and
            so do its row's other columns, which are repeated for each chunk.
    """

    def __init__(
        self,
        schema: pa.Schema,
        spec: VectorSpec,
        upload_id: str,
        *,
        whole_rows: bool,
        max_kept_bytes: int = _MAX_KEPT_BYTES,
    ) -> None:
        super().__init__(schema, spec, upload_id)
        self._whole_rows = whole_rows
        self._max_kept_bytes = min(max_kept_bytes, _MAX_KEPT_BYTES)
        self._kept: list[EmbeddingBatch | FletcherError] = []
        self._lost = False  # a part of the current row failed, and its error was returned

    def assemble(
        self, row_slice: RowSlice, outcome: EmbeddingBatch | FletcherError
    ) -> Output | None:
        outcome = self._finish(outcome)
        self._lost = self._lost and row_slice.part > 0
        before = self.kept_bytes = self.kept_bytes if self._kept else 0
        if self._whole_rows:
            self._keep(outcome)
            if row_slice.texts.continued:
                return None
            outcome, self._kept = _joined(self._kept), []
        errors = dict(row_slice.errors)
        if isinstance(outcome, FletcherError):
            errors |= dict.fromkeys(np.flatnonzero(row_slice.values >= 0).tolist(), outcome)
            outcome, chunks = _nothing(row_slice.texts.num_texts, self._spec.dims)
        else:
            chunks = outcome.chunks or _nothing(row_slice.texts.num_texts, self._spec.dims)[1]
        for chunk in sorted(outcome.errors):
            text = int(np.searchsorted(chunks.offsets, chunk, side="right")) - 1
            for row in np.flatnonzero(row_slice.values == text).tolist():
                errors.setdefault(row, outcome.errors[chunk])
        missing: BoolArray = row_slice.values < 0
        missing[list(errors)] = True
        texts = np.where(missing, 0, row_slice.values)
        counts = np.where(missing, 1, np.append(np.diff(chunks.offsets), 0)[texts])
        most = self._max_kept_bytes - before
        for row, num_bytes in _too_much(row_slice.rows, counts, most).items():
            errors[row] = _carries_too_much(num_bytes, most)
            missing[row], counts[row] = True, 1
        if self._lost:
            errors, counts = {}, np.zeros_like(counts)
        self._lost = self._lost or bool(errors)
        offsets = np.append(0, np.cumsum(counts))
        rows = np.repeat(np.arange(row_slice.num_rows), counts)
        places = chunks.offsets[texts][rows] + np.arange(len(rows)) - offsets[rows]
        batch = self._batch(row_slice, outcome, chunks, rows, places, missing[rows])
        self.kept_bytes = min(before + _added(row_slice.rows, batch), self._max_kept_bytes)
        return Output(batch, errors, offsets)

    def _keep(self, outcome: EmbeddingBatch | FletcherError) -> None:
        """Keeps the chunks of a text part until the whole text is ready.

        If a part failed, or if all chunks together take too much memory, keeps only the error.
        """
        if self._kept and isinstance(self._kept[0], FletcherError):
            return
        if not isinstance(outcome, FletcherError) and outcome.chunks is not None:
            spans = outcome.chunks.text_ranges
            self.kept_bytes += outcome.embeddings.nbytes + spans.nbytes
            if "text" in self.schema.names:
                self.kept_bytes += int((spans[:, 3] - spans[:, 2]).sum())
            if self._kept and self.kept_bytes > self._max_kept_bytes:
                outcome = RowTooLargeError(
                    f"the chunks of `text` take {self.kept_bytes} bytes or more, expected at most "
                    f"{self._max_kept_bytes} of one row; take larger chunks with less overlap, a "
                    "shorter text, or DoExchange, which sends chunks as they are ready; a server "
                    "with a larger --max-memory takes more, up to 256 MiB",
                    field="chunking",
                    allowed=[f"<= {self._max_kept_bytes} bytes of chunks"],
                )
        if isinstance(outcome, FletcherError):
            self._kept.clear()
            self.kept_bytes = 0
        self._kept.append(outcome)

    def _batch(
        self,
        row_slice: RowSlice,
        outcome: EmbeddingBatch,
        chunks: Chunks,
        rows: Int64Array,
        places: Int64Array,
        missing: BoolArray,
    ) -> pa.RecordBatch:
        """Returns the output batch.

        Args:
            rows: int64 [n], index of the slice's row that each output row belongs to.
            places: int64 [n], index of each output row's chunk; arbitrary for rows without a
                vector.
            missing: bool [n], whether an output row has no vector.
        """
        if not len(chunks.index):  # rows without a vector need a chunk to refer to
            outcome, chunks = _nothing(0, self._spec.dims, 1)
        places = np.where(missing, 0, places)
        spans = np.where(missing[:, None], 0, chunks.text_ranges[places])
        taken = pa.array(rows)
        columns: dict[str, Any] = {
            "id": self._ids(row_slice).take(taken),
            **vector_columns(outcome.embeddings[places], self._spec, missing),
            "timestamp": pa.array(
                np.full(len(rows), row_slice.timestamp_us), self._type("timestamp")
            ),
            "token_count": pa.array(np.where(missing, 0, outcome.token_count[places]), pa.int32()),
            "truncated": pa.array(np.zeros(len(rows), np.bool_)),
        }
        for field, values in zip(
            CHUNK_FIELDS, (chunks.index[places], spans[:, 0], spans[:, 1]), strict=True
        ):
            columns[field.name] = pa.array(values, field.type, mask=missing)
        for name in self.schema.names:
            if name == "text":
                columns[name] = self._texts(row_slice, rows, spans, missing)
            elif name not in columns:
                columns[name] = self._carried(row_slice, name).take(taken)
        arrays = [columns[name] for name in self.schema.names]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _texts(
        self, row_slice: RowSlice, rows: Int64Array, spans: Int64Array, missing: BoolArray
    ) -> pa.Array:
        held, begins = self._source(row_slice, rows)
        firsts = begins + spans[:, 2]
        lengths = spans[:, 3] - spans[:, 2]
        ends = np.append(0, np.cumsum(lengths))
        bounds = zip(firsts.tolist(), (firsts + lengths).tolist(), strict=True)
        found = b"".join([held[first:last] for first, last in bounds])
        texts = pa.LargeStringArray.from_buffers(len(rows), pa.py_buffer(ends), pa.py_buffer(found))
        nothing = pa.scalar(None, pa.large_utf8())
        if missing.any():
            texts = pc.if_else(pa.array(missing), nothing, texts)
        return texts.cast(self._type("text"))

    def _source(self, row_slice: RowSlice, rows: Int64Array) -> tuple[memoryview, Int64Array]:
        """Returns the source of output texts.

        Returns:
            UTF-8 bytes, and int64 [n], the position in these bytes at which the text of each output
            row's input row begins.
        """
        column = row_slice.rows.column("text")
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        column = large_utf8(column)
        data = column.buffers()[2]
        return memoryview(b"" if data is None else data), text_offsets(column)[:-1][rows]


def _added(rows: pa.RecordBatch, batch: pa.RecordBatch) -> int:
    """Returns the bytes that are added when rows' columns are repeated for each chunk."""
    carried = [name for name in rows.schema.names if name != "text"]
    columns = (batch.column(name.removeprefix("carried:")) for name in carried)
    repeated = sum(int(column.nbytes) for column in columns)
    return max(0, repeated - int(rows.select(carried).nbytes))


def _too_much(rows: pa.RecordBatch, counts: Int64Array, most: int) -> dict[int, int]:
    """Finds rows whose columns take too much memory when repeated for each chunk.

    A few kilobytes of text may have a thousand chunks, and each chunk has all columns of the row.

    Args:
        rows: Rows of a slice.
        counts: int64 [num_rows], number of each row's chunks.
        most: Most bytes of the repeated columns of all rows.

    Returns:
        Bytes of the repeated columns, by the row's index in the slice.
    """
    carried = rows.select([name for name in rows.schema.names if name != "text"])
    if carried.nbytes * int(counts.max(initial=0)) <= most:
        return {}
    sizes = counts * [carried.slice(row, 1).nbytes for row in range(len(counts))]
    if sizes.sum() <= most:
        return {}
    found = np.flatnonzero((sizes > most // len(sizes)) & (counts > 1))
    return {row: int(sizes[row]) for row in found.tolist()}


def _carries_too_much(num_bytes: int, most: int) -> RowTooLargeError:
    return RowTooLargeError(
        f"`columns`, repeated for each chunk of `text`, take {num_bytes} bytes, expected at most "
        f"{most}; carry fewer, or take larger chunks; a server with a larger --max-memory takes "
        "more, up to 256 MiB",
        field="columns",
        allowed=[f"<= {most} bytes"],
    )


def _joined(parts: list[EmbeddingBatch | FletcherError]) -> EmbeddingBatch | FletcherError:
    """Joins the chunks of a text's parts; returns the first error if any part failed."""
    good = []
    for part in parts:
        if isinstance(part, FletcherError):
            return part
        good.append(part)
    if len(good) == 1:
        return good[0]
    chunks = [part.chunks for part in good if part.chunks is not None]
    errors = [part.errors[min(part.errors)] for part in good if part.errors]
    return EmbeddingBatch(
        np.concatenate([part.embeddings for part in good]),
        None,
        np.concatenate([part.token_count for part in good]),
        np.concatenate([part.truncated for part in good]),
        dict(enumerate(errors[:1])),
        Chunks(
            np.array([0, sum(len(one.index) for one in chunks)], np.int64),
            np.concatenate([one.index for one in chunks]),
            np.concatenate([one.num_tokens for one in chunks]),
            np.concatenate([one.text_ranges for one in chunks]),
            np.concatenate([one.begins for one in chunks]),
        ),
    )


def _nothing(num_texts: int, dims: int, num_chunks: int = 0) -> tuple[EmbeddingBatch, Chunks]:
    numbers, ranges = np.zeros(num_chunks, np.int32), np.zeros((num_chunks, 4), np.int64)
    offsets, begins = np.zeros(num_texts + 1, np.int64), np.zeros(num_chunks, np.bool_)
    chunks = Chunks(offsets, numbers, numbers, ranges, begins)
    return EmbeddingBatch.zeros(num_chunks, dims), chunks
