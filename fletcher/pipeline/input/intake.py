"""Intake of a client's batches: validation, and division into row slices.

An `Intake` belongs to one call. It validates every batch before other code reads the batch, because
Arrow does not detect bad offsets and invalid UTF-8 when it receives one. It finds rows that cannot
be embedded, and cuts the batch into `RowSlice`s. A row slice has the distinct texts to embed, and
the index of each row's vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from fletcher.core.batches import BoolArray, Int32Array, Int64Array, Priority, TextBatch, Truncate
from fletcher.core.chunking import Chunking
from fletcher.core.command import EmbedCommand
from fletcher.core.stored_vectors import StoredVectors
from fletcher.pipeline.input.arrays import distinct, large_utf8, text_offsets, validate
from fletcher.pipeline.input.columns import InputColumns
from fletcher.pipeline.input.limits import INTERACTIVE_BYTES, INTERACTIVE_ROWS, IntakeLimits
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.input.text_parts import part_ends
from fletcher.pipeline.interactive.single_row import single_text
from fletcher.pipeline.row_errors import RowErrors

# Takes the used columns of consecutive rows, and the offset of the first row in the upload.
# Returns bool [num_rows], True for rows that need no vector, and stored vectors of other rows.
Skip = Callable[[pa.RecordBatch, int], tuple[BoolArray, StoredVectors | None]]


@dataclass(frozen=True, slots=True)
class TextTreatment:
    """Settings for embedding that apply to all texts of a call.

    Attributes:
        prompt: Literal text that is put in front of every text.
        layers: Exit layer that vectors come from; 0: the last.
        chunking: How texts are cut into chunks. None: texts are not cut.
        chunk_overhead: Number of prompt tokens and special tokens in each chunk.
        half: Whether the model's graph outputs float16 vectors for bulk work.
    """

    prompt: str = ""
    layers: int = 0
    chunking: Chunking | None = None
    chunk_overhead: int = 0
    half: bool = False


class Intake:
    """Input of one call.

    Args:
        carry_text: Whether the output has the texts.
        small_is_interactive: Whether batches of a few short rows overtake bulk work.

    Attributes:
        id_type: Type of the ids; utf8 if the input has no id column.
        carried_fields: Output fields of the columns that are copied from input to output.

    Raises:
        FletcherError: The schema or the command is wrong; the errors are those of `InputColumns`.
    """

    def __init__(
        self,
        schema: pa.Schema,
        command: EmbedCommand,
        limits: IntakeLimits,
        treatment: TextTreatment,
        *,
        carry_text: bool,
        small_is_interactive: bool,
    ) -> None:
        chunking = treatment.chunking
        if chunking is not None:
            limits = limits.for_chunks(chunking, treatment.chunk_overhead)
        self._limits = limits
        self._treatment = treatment
        self._chunking = chunking
        self._truncate: Truncate = command.truncate
        self._priority = command.priority
        self._small_is_interactive = small_is_interactive
        self._columns = InputColumns(schema, command, limits.max_message_bytes)
        self.has_ids, self.id_type = self._columns.has_ids, self._columns.id_type
        self.has_metadata = self._columns.has_metadata
        self.carried_fields, self.carry_text = self._columns.carried, carry_text
        self._dictionary: pa.Array | None = None
        self._seen = np.zeros(0, np.bool_)

    def row_slices(
        self,
        batch: pa.RecordBatch,
        batch_id: int,
        row_first: int,
        *,
        keep: Callable[[int], bool] = lambda _: True,
        skip: Skip | None = None,
        ends: bool = False,  # noqa: ARG002 - every row is a whole text
    ) -> Iterator[RowSlice]:
        """Validates a batch and yields one or more row slices.

        Args:
            batch_id: The client's number of the batch, or its position in the call.
            row_first: Offset of the batch's first row in the upload.
            keep: Returns whether the vectors of a dictionary may be kept for later batches. Gets
                their size in bytes.
            skip: Returns a mask of the rows in a slice that need no vector, and stored vectors of
                other rows, which then are not embedded. None: all rows are embedded.
            ends: Whether the last row ends its text. Only `DocumentIntake` uses this argument.

        Raises:
            BatchTooLargeError: The batch is larger than `max_message_bytes`.
            InvalidUtf8Error, ColumnTypeError: The batch has invalid arrays. No row of it was used.
        """
        plain = self._columns.only_texts and self._chunking is None
        if plain and batch.num_rows == 1 and skip is None:
            single = self._single_row(batch, batch_id, row_first)
            if single is not None:
                return iter((single,))
        return self._row_slices(batch, batch_id, row_first, keep, skip)

    def _row_slices(
        self,
        batch: pa.RecordBatch,
        batch_id: int,
        row_first: int,
        keep: Callable[[int], bool],
        skip: Skip | None,
    ) -> Iterator[RowSlice]:
        timestamp_us = time.time_ns() // 1000
        used = self._columns.checked(batch)
        text = used.column("text")
        dictionary = None
        if pa.types.is_dictionary(text.type):
            dictionary = large_utf8(text.dictionary)
            codes = _codes(text)
            sizes = np.append(np.diff(text_offsets(dictionary)), 0)[codes]  # 0 for code -1
        else:
            text = large_utf8(text)
            sizes = np.diff(text_offsets(text))
        errors = RowErrors(used, sizes, self._limits.max_row_bytes)
        held_bytes = self._columns.held_bytes(batch, used, int(sizes.sum()))
        shared = new_table = False
        rows = self._chunking is not None and self._chunking.rows  # a table has 1 vector per value
        if dictionary is not None and len(dictionary) <= self._limits.table_values and not rows:
            new_table = self._dictionary is None or not self._dictionary.equals(dictionary)
            shared = not new_table or self._remember(dictionary, keep)
        priority = self._priority_of(batch.num_rows, int(sizes.sum()))
        half = self._treatment.half and priority == "bulk"
        limits = self._limits.for_float16() if half else self._limits
        bounds = _cuts(sizes, limits.slice_rows, limits.slice_bytes)
        for index, (first, last) in enumerate(bounds):
            rows = used.slice(first, last - first)
            own_errors, wanted = errors.between(first, last), np.ones(last - first, np.bool_)
            wanted[list(own_errors)] = False
            unwanted, stored = np.zeros(0, np.int64), None
            if skip is not None:
                unneeded, stored = skip(rows, row_first + first)
                unwanted = np.flatnonzero(wanted & unneeded)
                wanted[unwanted] = False
            if stored is not None:
                stored = stored.among(wanted)
                wanted[stored.rows] = False
            new_values: Int32Array | None = None
            if dictionary is not None:
                found = self._wanted(codes[first:last], dictionary, wanted, shared=shared)
                values, texts, new_values = found
            else:  # a repeated text is embedded once
                values, texts = distinct(text.slice(first, last - first))
                if not wanted.all():
                    values, texts, _ = self._wanted(values, texts, wanted, shared=False)
            text_bytes = int(sizes[first:last].sum())
            rows_bytes = text_bytes + held_bytes * (last - first) // max(1, batch.num_rows)
            row_slice = RowSlice(
                batch_id=batch_id,
                row_first=row_first + first,
                rows=rows,
                texts=self._text_batch(texts, half=half),
                values=values,
                timestamp_us=timestamp_us,
                num_bytes=(limits.bytes_per_byte - 1) * text_bytes
                + (last - first) * limits.bytes_per_row
                + rows_bytes,
                priority=priority,
                last=index == len(bounds) - 1,
                errors=own_errors,
                skipped=unwanted,
                stored=stored,
                new_values=new_values,
                new_table=len(self._seen) if shared and new_table and index == 0 else None,
            )
            yield from self._parts(row_slice, rows_bytes)

    def _wanted(
        self, codes: Int32Array | Int64Array, words: pa.Array, wanted: BoolArray, *, shared: bool
    ) -> tuple[Int32Array, pa.Array, Int32Array | None]:
        """Returns the distinct texts of wanted rows.

        Args:
            codes: [num_rows], index of each row's text in `words`; arbitrary for unwanted rows.
            words: The texts that `codes` refers to.
            wanted: bool [num_rows], whether a row needs a vector.
            shared: Whether `words` is the dictionary whose vectors are kept. If so, texts of it
                that were embedded before are left out.

        Returns:
            `values`, `texts` and `new_values` of a `RowSlice`, in this order.
        """
        values = np.where(wanted, codes, -1).astype(np.int32)
        new = np.unique(values[values >= 0])
        if shared:
            new = new[~self._seen[new]]
            self._seen[new] = True
            return values, words.take(pa.array(new)), new
        places = np.searchsorted(new, values).astype(np.int32)
        return np.where(values >= 0, places, -1).astype(np.int32), words.take(pa.array(new)), None

    def rest(self) -> Iterator[RowSlice]:
        """Yields the row slices that are left at the end of the call.

        Only `DocumentIntake` yields any.
        """
        return iter(())

    def _single_row(self, batch: pa.RecordBatch, batch_id: int, row_first: int) -> RowSlice | None:
        """Returns the row slice of a batch of one text; None if it is null or too large."""
        text = batch.column(self._columns.text)
        validate(text, "text")
        size = batch.get_total_buffer_size()
        if text.null_count or size > self._limits.max_message_bytes:
            return None
        data = single_text(text)
        if len(data) > self._limits.max_row_bytes:
            return None
        return RowSlice(
            batch_id=batch_id,
            row_first=row_first,
            rows=batch,
            texts=self._texts(data, np.array([0, len(data)], np.int64)),
            values=np.zeros(1, np.int32),
            timestamp_us=time.time_ns() // 1000,
            num_bytes=(self._limits.bytes_per_byte - 1) * len(data)
            + self._limits.bytes_per_row
            + size,
            priority=self._priority_of(1, len(data)),
        )

    def _parts(self, row_slice: RowSlice, rows_bytes: int) -> Iterator[RowSlice]:
        """Yields the row slice, or one slice for each part of a long text in chunks.

        Only the slice of the last part counts `rows_bytes`, the memory of the rows: the rows stay
        in memory until that part is done.
        """
        data = row_slice.texts.data
        if self._chunking is None or row_slice.texts.num_texts != 1:
            yield row_slice
            return
        ends = part_ends(bytes(data), self._limits.slice_bytes)
        parts_bytes = row_slice.num_bytes - rows_bytes
        for part, (first, last) in enumerate(pairwise([0, *ends])):
            texts = replace(
                row_slice.texts,
                data=data[first:last],
                offsets=np.array([0, last - first], np.int64),
                continued=last < len(data),
            )
            yield replace(
                row_slice,
                texts=texts,
                last=row_slice.last and not texts.continued,
                num_bytes=max(1, parts_bytes * (last - first) // max(1, len(data)))
                + (0 if texts.continued else rows_bytes),
                part=part,
            )

    def _remember(self, dictionary: pa.Array, keep: Callable[[int], bool]) -> bool:
        """Keeps a dictionary if there is room for a table of its vectors."""
        # A value in the table takes half as much memory as a row in the pipeline.
        num_bytes = int(dictionary.nbytes) + len(dictionary) * self._limits.bytes_per_row // 2
        kept = keep(num_bytes)
        self._dictionary = dictionary if kept else None
        self._seen = np.zeros(len(dictionary), np.bool_)
        return kept

    def _text_batch(self, texts: pa.Array, *, half: bool) -> TextBatch:
        offsets = text_offsets(texts)
        first, last = int(offsets[0]), int(offsets[-1])
        data = texts.buffers()[2]
        raw = b"" if data is None else data.slice(first, last - first).to_pybytes()
        return self._texts(raw, offsets - first, half=half)

    def _texts(self, data: bytes, offsets: Int64Array, *, half: bool = False) -> TextBatch:
        return TextBatch(
            data,
            offsets,
            self._truncate,
            self._treatment.prompt,
            chunking=self._chunking,
            layers=self._treatment.layers,
            half=half,
        )

    def is_bulk(self, batch: pa.RecordBatch) -> bool:
        """Whether a call is bulk work, judged by its first batch.

        The batch need not be validated yet: only its number of rows is read.
        """
        return self._priority_of(batch.num_rows, 0) == "bulk"

    def _priority_of(self, num_rows: int, num_bytes: int) -> Priority:
        if self._priority is not None:
            return self._priority
        small = num_rows <= INTERACTIVE_ROWS and num_bytes <= INTERACTIVE_BYTES
        return "interactive" if self._small_is_interactive and small else "bulk"


def _codes(texts: pa.DictionaryArray) -> Int64Array:
    """Returns int64 [n], the codes of a dictionary array; -1 for nulls."""
    codes: Int64Array = texts.indices.cast(pa.int64()).fill_null(-1).to_numpy()
    return codes


def _cuts(sizes: Int64Array, max_rows: int, max_bytes: int) -> list[tuple[int, int]]:
    """Cuts rows into ranges of at most `max_rows` rows and `max_bytes` bytes.

    A row with more bytes is a range by itself. Without rows, returns one empty range.
    """
    if len(sizes) == 0:
        return [(0, 0)]
    ends = np.cumsum(sizes)
    cuts, first, before = [], 0, 0
    while first < len(sizes):
        last = int(np.searchsorted(ends, before + max_bytes, side="right"))
        last = min(max(last, first + 1), first + max_rows, len(sizes))
        cuts.append((first, last))
        first, before = last, int(ends[last - 1])
    return cuts
