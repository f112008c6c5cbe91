"""Intake of documents that span several rows (`continuous`).

Consecutive rows with the same id are one document, even if they are in different batches. The
document's text is the joined text of its rows. Text that can be tokenized already is sent on as
parts of one long text (`fletcher.pipeline.input.text_parts`). The end of the text so far, mostly
its last word, is held back, because later rows may continue that word. So the chunks are the same
as if the whole text had come in one row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.core.batches import Priority
from fletcher.errors import FletcherError
from fletcher.pipeline.input.arrays import large_utf8, text_offsets
from fletcher.pipeline.input.intake import Intake, Skip
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.input.text_parts import last_end, part_ends
from fletcher.pipeline.row_errors import RowErrors

# Most bytes that are held back of text without spaces between words, such as Chinese.
_MAX_HELD_BYTES = 4096


@dataclass(slots=True)
class _Document:
    """A document whose end has not been received.

    Attributes:
        row: The document's first row, with an empty text.
        row_first: Offset of that row in the upload.
        held: End of the text so far, which is held back because later rows may continue it.
        num_parts: Number of text parts so far.
        failed: The document's error was sent. Its further rows are dropped.
    """

    row: pa.RecordBatch
    row_first: int
    held: bytes = b""
    num_parts: int = 0
    failed: bool = False

    def goes_on(self, ids: pa.Array | None) -> bool:
        """Whether the first of these ids is the document's, so that its text goes on."""
        if ids is None:
            return True
        found = ids[0].as_py()
        return found is not None and found == self.row.column("id")[0].as_py()


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of a document's text, or the document's error.

    Without `continued` it is the last part.
    """

    document: _Document
    text: bytes
    continued: bool = False
    error: FletcherError | None = None


class DocumentIntake(Intake):
    """Intake of documents in several rows. Takes the arguments of `Intake`."""

    _document: _Document | None = None

    def row_slices(
        self,
        batch: pa.RecordBatch,
        batch_id: int,
        row_first: int,
        *,
        keep: Callable[[int], bool] = lambda _: True,  # noqa: ARG002 - there are no tables
        skip: Skip | None = None,
        ends: bool = False,
    ) -> Iterator[RowSlice]:
        """Validates a batch; yields a row slice for each part, or one empty slice.

        Each row slice is one text part of a document. Its only row is the document's first row.
        Arguments and errors are those of `Intake.row_slices`. With `ends` the last document ends
        with this batch.
        """
        assert skip is None  # only uploads skip rows
        used = self._columns.checked(batch)
        texts = large_utf8(self._columns.decoded(used.column("text"), "text"))
        sizes = np.diff(text_offsets(texts))
        errors = RowErrors(used, sizes, self._limits.max_row_bytes)
        priority = self._priority_of(batch.num_rows, int(sizes.sum()))
        found = self._parts_of(used, texts, errors, row_first, ends=ends)
        yield from self._made(found, used, batch_id, priority)

    def rest(self) -> Iterator[RowSlice]:
        """Yields the row slices of the last document's end, unless it ended before."""
        document = self._document
        if document is not None:
            priority = self._priority_of(1, len(document.held))
            yield from self._made(self._end(), document.row, None, priority)

    def _parts_of(
        self,
        used: pa.RecordBatch,
        texts: pa.Array,
        errors: RowErrors,
        row_first: int,
        *,
        ends: bool,
    ) -> Iterator[_Part]:
        ids = used.column("id") if self.has_ids else None
        offsets, data = text_offsets(texts), texts.buffers()[2]
        view = memoryview(b"" if data is None else data)
        for first, last in _runs(ids, len(texts)):
            document = self._document
            if document is None or first or not document.goes_on(ids):
                yield from self._end()
                document = self._document = _Document(_row(used, first), row_first + first)
            if document.failed:
                continue
            bad = errors.first_between(first, last)
            end = last if bad is None else bad
            complete = bad is None and (ends or last < len(texts))
            yield from self._go_on(document, view[offsets[first] : offsets[end]], ends=complete)
            if bad is not None:
                document.failed = True
                # In the pipeline, this part also ends the text so far, which would else continue.
                yield _Part(document, b"", error=errors.between(bad, bad + 1)[0])
        if ends:
            yield from self._end()

    def _go_on(self, document: _Document, text: memoryview, *, ends: bool) -> Iterator[_Part]:
        """Adds text to a document and yields the parts that are complete.

        With `ends` these are all parts up to the end of the document.
        """
        if document.held:
            text = memoryview(document.held + text)
        max_bytes = self._limits.slice_bytes
        places = [0, *part_ends(text, max_bytes)]
        if ends:
            self._document = None
        else:
            places[-1] = places[-2] + last_end(text[places[-2] :], min(max_bytes, _MAX_HELD_BYTES))
            document.held = bytes(text[places[-1] :])
        for first, last in pairwise(places):
            if ends or first < last:
                continued = not ends or last < len(text)
                yield _Part(document, bytes(text[first:last]), continued)

    def _end(self) -> Iterator[_Part]:
        document, self._document = self._document, None
        if document is not None and not document.failed:
            yield from self._go_on(document, memoryview(b""), ends=True)

    def _made(
        self, parts: Iterable[_Part], rows: pa.RecordBatch, batch_id: int | None, priority: Priority
    ) -> Iterator[RowSlice]:
        """Yields a row slice for each part, and marks the last one with `last`.

        Yields one empty slice if there are no parts.
        """
        # Every batch gets an answer, so even an empty slice holds memory for one.
        row_slice = RowSlice(
            batch_id=batch_id,
            row_first=0,
            rows=rows.slice(0, 0),
            texts=self._texts(b"", np.zeros(1, np.int64)),
            values=np.zeros(0, np.int32),
            timestamp_us=time.time_ns() // 1000,
            num_bytes=self._limits.bytes_per_row,
            priority=priority,
            last=False,
            # Number of the next part: only part 0 makes the assembler begin a new document.
            part=self._document.num_parts if self._document else 0,
        )
        nothing = row_slice
        for number, part in enumerate(parts):
            if number:
                yield row_slice
            row_slice = self._row_slice(nothing, part)
        yield replace(row_slice, last=True)

    def _row_slice(self, nothing: RowSlice, part: _Part) -> RowSlice:
        document, size = part.document, len(part.text)
        texts = self._texts(part.text, np.array([0, size], np.int64))
        document.num_parts += 1
        return replace(
            nothing,
            row_first=document.row_first,
            rows=document.row,
            texts=replace(texts, continued=part.continued),
            values=np.zeros(1, np.int32),
            errors={} if part.error is None else {0: part.error},
            num_bytes=self._limits.bytes_per_byte * size + self._limits.bytes_per_row,
            part=document.num_parts - 1,
        )


def _runs(ids: pa.Array | None, num_rows: int) -> Iterator[tuple[int, int]]:
    """Yields ranges of consecutive rows with the same id.

    A row with a null id is a range by itself. Without ids, all rows are one range.
    """
    if ids is None or num_rows < 2:
        return iter([(0, num_rows)] if num_rows else [])
    others = pc.fill_null(pc.not_equal(ids[1:], ids[:-1]), True)
    places = np.flatnonzero(others.to_numpy(zero_copy_only=False)) + 1
    return pairwise([0, *places.tolist(), num_rows])


def _row(used: pa.RecordBatch, row: int) -> pa.RecordBatch:
    """Copies one row without its text, so that its batch can be freed."""
    one = pa.array([row])
    columns = {name: used.column(name).take(one) for name in used.schema.names if name != "text"}
    return pa.RecordBatch.from_pydict({**columns, "text": pa.array([""], pa.large_utf8())})
