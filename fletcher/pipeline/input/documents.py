"""Intake of documents that span several rows (`continuous`).

Consecutive rows with the same id are one document, across batches; its text is that of its rows,
joined. Text that can be tokenized already leaves as parts of one long text
(`fletcher.pipeline.input.text_parts`). Text that later rows may change, mostly the last word, is
held back. So the chunks are those of the joined text.
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

# Size of the parts of text without spaces between words, such as Chinese.
_MAX_HELD_BYTES = 4096


@dataclass(slots=True)
class _Document:
    """A document whose end has not been received.

    Attributes:
        row: Its first row, with an empty text.
        held: End of its text, which later rows may change.
        failed: It failed, and its error was sent; the rest of it is dropped.
    """

    row: pa.RecordBatch
    row_first: int
    held: bytes = b""
    num_parts: int = 0
    failed: bool = False

    def goes_on(self, ids: pa.Array | None) -> bool:
        """Whether rows with these ids begin with more of the document."""
        if ids is None:
            return True
        found = ids[0].as_py()
        return found is not None and found == self.row.column("id")[0].as_py()


@dataclass(frozen=True, slots=True)
class _Part:
    """Part of a document's text (the last unless `continued`), or its error."""

    document: _Document
    text: bytes
    continued: bool = False
    error: FletcherError | None = None


class DocumentIntake(Intake):
    """Intake of documents in several rows; arguments are those of `Intake`."""

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
        """Validates a batch; yields parts of documents, or an empty slice.

        A row slice is one part of a document, and has one row: the document's first. Arguments and
        errors are those of `Intake.row_slices`; with `ends` the last document ends with this batch.
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
        """Yields the end of the last document, unless it has ended."""
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
                # The error also ends the text so far, which later rows would continue.
                yield _Part(document, b"", error=errors.between(bad, bad + 1)[0])
        if ends:
            yield from self._end()

    def _go_on(self, document: _Document, text: memoryview, *, ends: bool) -> Iterator[_Part]:
        """Yields the parts of a document that are ready; all of it if it ends."""
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
        """Yields row slices for parts, and marks the last; without parts, an empty slice."""
        # Every batch gets an answer, whose memory its slice holds.
        row_slice = RowSlice(
            batch_id=batch_id,
            row_first=0,
            rows=rows.slice(0, 0),
            texts=self._texts(b"", np.zeros(1, np.int64)),
            values=np.zeros(0, np.int32),
            timestamp_ns=time.time_ns(),
            num_bytes=self._limits.bytes_per_row,
            priority=priority,
            last=False,
            # Of the current document, so that its state stays.
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
    """Yields ranges of consecutive rows with the same id; null ids are alone."""
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
