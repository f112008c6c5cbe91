"""What a client sent, checked in full and cut into pieces that the pipeline can hold.

`Intake` knows one call's input schema. It validates every batch before anything reads it (Arrow
hands over bad offsets and invalid UTF-8 without a word), finds the rows that cannot be embedded,
and cuts the rest into `Piece`s: the distinct texts to embed, and which row takes which vector.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa

from fletcher.batches import (
    BoolArray,
    Int32Array,
    Int64Array,
    Priority,
    TextBatch,
    Truncate,
)
from fletcher.chunking import Chunking
from fletcher.errors import (
    BatchTooLargeError,
    ColumnTypeError,
)
from fletcher.options import EmbedOptions
from fletcher.pipeline.arrays import (
    decoded_bytes,
    distinct,
    large_utf8,
    only_text,
    text_offsets,
    validate,
    viewed_bytes,
    without_views,
)
from fletcher.pipeline.columns import check_text, column, is_flat_text, optional_utf8, plain
from fletcher.pipeline.limits import INTERACTIVE_BYTES, INTERACTIVE_ROWS, IntakeLimits
from fletcher.pipeline.parts import part_ends
from fletcher.pipeline.piece import Piece
from fletcher.pipeline.row_errors import RowErrors

# What a row takes here at least, whatever its size on the wire: offsets, lengths, masks.
_ROW_BYTES = 16

# From the used columns of consecutive rows, and the first one's offset in the upload, to a mask.
Skip = Callable[[pa.RecordBatch, int], BoolArray]


class Intake:
    """One call's input.

    Args:
        schema: Of the input stream.
        options: The command.
        prompt: Literal text put before every text.
        layers: The exit layer that vectors come from; 0: the last.
        limits: Bounds.
        carry_text: The text is carried to the output.
        small_is_interactive: Batches of a few short rows overtake bulk work.
        chunking: How texts are cut into chunks; None: not at all.
        taken: Of each chunk, tokens that are not the text's: the prompt's and special ones.
        half: Vectors of bulk work are float16 from the graph on.

    Raises:
        UnknownColumnError: A named column is not there.
        ColumnTypeError: The text or id column is of no accepted type.
    """

    def __init__(
        self,
        schema: pa.Schema,
        options: EmbedOptions,
        *,
        prompt: str,
        layers: int = 0,
        limits: IntakeLimits,
        carry_text: bool,
        small_is_interactive: bool,
        chunking: Chunking | None = None,
        taken: int = 0,
        half: bool = False,
    ) -> None:
        self._limits = limits if chunking is None else limits.for_chunks(chunking, taken)
        self._half = half
        self._bulk_limits = self._limits.for_float16() if half else self._limits
        self._prompt = prompt
        self._layers = layers
        self._chunking = chunking
        self._truncate: Truncate = options.truncate  # type: ignore[assignment]
        self._priority = options.priority
        self._small_is_interactive = small_is_interactive
        self._text = column(schema, options.text_column, "text_column")
        kind = check_text(schema.field(self._text))
        self._id = self._find_id(schema, options)
        self._metadata = optional_utf8(schema, "metadata")
        self._carried = [column(schema, name, "columns") for name in options.columns]
        self.carry_text = carry_text
        self.id_type = pa.utf8() if self._id is None else schema.field(self._id).type
        self.carried_fields = [plain(schema.field(index)) for index in self._carried]
        # Nothing but texts, as a search sends them; named as in a piece's rows.
        others = self._id is not None or self._carried or chunking
        self._is_plain = schema.names == ["text"] and is_flat_text(kind) and not others
        self._dictionary: pa.Array | None = None
        self._seen = np.zeros(0, np.bool_)

    @property
    def has_ids(self) -> bool:
        """The input has an id column."""
        return self._id is not None

    @property
    def has_metadata(self) -> bool:
        """The input has a `metadata` column of strings."""
        return self._metadata is not None

    def pieces(
        self,
        batch: pa.RecordBatch,
        batch_id: int,
        row_first: int,
        *,
        keep: Callable[[int], bool] = lambda _: True,
        skip: Skip | None = None,
        ends: bool = False,  # noqa: ARG002 - every row is a whole text
    ) -> Iterator[Piece]:
        """Checks a batch and cuts it up; an empty batch gives one empty piece.

        Args:
            batch: As received.
            batch_id: Its number.
            row_first: Offset of its first row in the upload.
            keep: Asked whether the vectors of a dictionary may be kept, so many bytes, for batches
                to come.
            skip: Tells which rows of a piece are not wanted; None: all are.
            ends: A text ends with the last row; here with every one.

        Raises:
            BatchTooLargeError: The batch is larger than `max_message_bytes`.
            InvalidUtf8Error, ColumnTypeError: Its arrays are not valid; nothing of it was used.
        """
        single = None
        if self._is_plain and batch.num_rows == 1 and skip is None:
            single = self._single(batch, batch_id, row_first)
        if single is not None:
            return iter((single,))
        return self._pieces(batch, batch_id, row_first, keep, skip)

    def _pieces(
        self,
        batch: pa.RecordBatch,
        batch_id: int,
        row_first: int,
        keep: Callable[[int], bool],
        skip: Skip | None,
    ) -> Iterator[Piece]:
        timestamp_ns = time.time_ns()
        used = self._used_columns(batch)
        text = used.column("text")
        dictionary = None
        if pa.types.is_dictionary(text.type):
            dictionary = large_utf8(text.dictionary)
            codes = _codes(text)
            sizes = np.append(np.diff(text_offsets(dictionary)), 0)[codes]  # code -1 takes the 0
        else:
            text = large_utf8(text)
            sizes = np.diff(text_offsets(text))
        errors = RowErrors(used, sizes, self._limits.max_row_bytes)
        held_bytes = self._held_bytes(batch, used, int(sizes.sum()))
        shared = new_table = False
        rows = self._chunking is not None and self._chunking.rows  # any number a value: no table
        if dictionary is not None and len(dictionary) <= self._limits.table_values and not rows:
            new_table = self._dictionary is None or not self._dictionary.equals(dictionary)
            shared = not new_table or self._remember(dictionary, keep)
        priority = self._class_of(batch.num_rows, int(sizes.sum()))
        limits = self._bulk_limits if priority == "bulk" else self._limits
        bounds = _cuts(sizes, limits.piece_rows, limits.piece_bytes)
        for index, (first, last) in enumerate(bounds):
            rows = used.slice(first, last - first)
            own_errors, wanted = errors.of(first, last), np.ones(last - first, np.bool_)
            wanted[list(own_errors)] = False
            unwanted = np.zeros(0, np.int64)
            if skip is not None:
                unwanted = np.flatnonzero(wanted & skip(rows, row_first + first))
                wanted[unwanted] = False
            own_codes: Int32Array | Int64Array
            if dictionary is None:  # made one, so that a repeated text is embedded once
                own_codes, words = distinct(text.slice(first, last - first))
            else:
                own_codes, words = codes[first:last], dictionary
            new_values: Int32Array | None = None
            if dictionary is None and wanted.all():  # so is every word
                values, texts = own_codes.astype(np.int32, copy=False), words
            else:
                values = np.where(wanted, own_codes, -1).astype(np.int32)
                new = np.unique(values[values >= 0])
                if shared:
                    new = new_values = new[~self._seen[new]]
                    self._seen[new] = True
                else:
                    places = np.searchsorted(new, values).astype(np.int32)
                    values = np.where(values >= 0, places, -1).astype(np.int32)
                texts = words.take(pa.array(new))
            text_bytes = int(sizes[first:last].sum())
            rows_bytes = text_bytes + held_bytes * (last - first) // max(1, batch.num_rows)
            piece = Piece(
                batch_id=batch_id,
                row_first=row_first + first,
                rows=rows,
                texts=self._text_batch(texts, half=self._half and priority == "bulk"),
                values=values,
                timestamp_ns=timestamp_ns,
                num_bytes=(limits.bytes_per_byte - 1) * text_bytes
                + (last - first) * limits.bytes_per_row
                + rows_bytes,
                priority=priority,
                last=index == len(bounds) - 1,
                errors=own_errors,
                skipped=unwanted,
                new_values=new_values,
                new_table=len(self._seen) if shared and new_table and index == 0 else None,
            )
            yield from self._parts(piece, rows_bytes)

    def rest(self) -> Iterator[Piece]:
        """What is left where the call ends; here nothing."""
        return iter(())

    def _single(self, batch: pa.RecordBatch, batch_id: int, row_first: int) -> Piece | None:
        """The piece of a single text; None: there is something to say about it.

        What is done for many rows takes three times as long for one, most of it to begin.
        """
        text = batch.column(self._text)
        validate(text, "text")
        size = batch.get_total_buffer_size()
        if text.null_count or size > self._limits.max_message_bytes:
            return None
        data = only_text(text)
        if len(data) > self._limits.max_row_bytes:
            return None
        return Piece(
            batch_id=batch_id,
            row_first=row_first,
            rows=batch,
            texts=self._texts(data, np.array([0, len(data)], np.int64)),
            values=np.zeros(1, np.int32),
            timestamp_ns=time.time_ns(),
            num_bytes=(self._limits.bytes_per_byte - 1) * len(data)
            + self._limits.bytes_per_row
            + size,
            priority=self._class_of(1, len(data)),
        )

    def _parts(self, piece: Piece, rows_bytes: int) -> Iterator[Piece]:
        """The piece, or one for each part of its only text, which is long and cut into chunks.

        The rows, `rows_bytes`, are there until the last part is done, which counts them.
        """
        data = piece.texts.data
        if self._chunking is None or piece.texts.num_texts != 1:
            yield piece
            return
        ends = part_ends(bytes(data), self._limits.piece_bytes)
        parts_bytes = piece.num_bytes - rows_bytes
        for part, (first, last) in enumerate(pairwise([0, *ends])):
            texts = dataclasses.replace(
                piece.texts,
                data=data[first:last],
                offsets=np.array([0, last - first], np.int64),
                continued=last < len(data),
            )
            yield dataclasses.replace(
                piece,
                texts=texts,
                last=piece.last and not texts.continued,
                num_bytes=max(1, parts_bytes * (last - first) // max(1, len(data)))
                + (0 if texts.continued else rows_bytes),
                part=part,
            )

    def _used_columns(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        self._check_size(
            max(batch.get_total_buffer_size(), _ROW_BYTES * batch.num_rows),
            f"a batch has {batch.num_rows} rows and",
        )
        columns = {"text": self._text, "id": self._id, "metadata": self._metadata}
        arrays = {name: batch.column(index) for name, index in columns.items() if index is not None}
        for index in self._carried:
            arrays[f"carried:{batch.schema.field(index).name}"] = batch.column(index)
        for key, array in arrays.items():
            name = key.removeprefix("carried:")
            validate(array, name)
            # A few bytes may stand for many: those are counted before they are written out.
            self._check_size(viewed_bytes(array), f"`{name}` holds views of")
            arrays[key] = without_views(array)
            if key != "text" and pa.types.is_dictionary(array.type):
                arrays[key] = self._decoded(arrays[key], name)
        return pa.RecordBatch.from_pydict(arrays)

    def _decoded(self, array: pa.DictionaryArray, name: str) -> pa.Array:
        self._check_size(decoded_bytes(array), f"column `{name}` stands for")
        return array.dictionary_decode()

    def _check_size(self, num_bytes: int, what: str) -> None:
        if num_bytes > self._limits.max_message_bytes:
            raise BatchTooLargeError(
                f"{what} {num_bytes} bytes, at most {self._limits.max_message_bytes} are "
                "accepted; send smaller batches",
                allowed=[f"<= {self._limits.max_message_bytes} bytes"],
            )

    def _held_bytes(self, batch: pa.RecordBatch, used: pa.RecordBatch, text_bytes: int) -> int:
        """What a batch keeps in memory beside its texts, of so many bytes.

        Used columns or not: a column that came over Flight keeps its whole message, and its buffers
        may hold more than its rows refer to.
        """
        text = batch.column(self._text)
        if pa.types.is_dictionary(text.type):
            text_bytes = text.nbytes
        decoded = sum(
            used.column(f"carried:{batch.schema.field(index).name}").nbytes
            for index, field in zip(self._carried, self.carried_fields, strict=True)
            if batch.schema.field(index).type != field.type
        )
        return int(max(0, batch.get_total_buffer_size() - text_bytes) + decoded)

    def _remember(self, dictionary: pa.Array, keep: Callable[[int], bool]) -> bool:
        """Keeps a dictionary for a table of its vectors, if there is room for that."""
        # A value takes there half of what a row takes on its whole way.
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
            self._prompt,
            chunking=self._chunking,
            layers=self._layers,
            half=half,
        )

    def is_bulk(self, batch: pa.RecordBatch) -> bool:
        """Whether a call that begins with this batch, unchecked yet, is here for bulk work."""
        return self._class_of(batch.num_rows, 0) == "bulk"

    def _class_of(self, num_rows: int, num_bytes: int) -> Priority:
        if self._priority is not None:
            return self._priority  # type: ignore[return-value]
        small = num_rows <= INTERACTIVE_ROWS and num_bytes <= INTERACTIVE_BYTES
        return "interactive" if self._small_is_interactive and small else "bulk"

    @staticmethod
    def _find_id(schema: pa.Schema, options: EmbedOptions) -> int | None:
        if options.id_column == "id" and options.id_column not in schema.names:
            return None
        index = column(schema, options.id_column, "id_column")
        kind = schema.field(index).type
        if not (pa.types.is_string(kind) or pa.types.is_integer(kind)):
            raise ColumnTypeError(
                f"`id_column` {options.id_column!r} is {kind}, expected utf8 or an integer type",
                field="id_column",
                allowed=["utf8", "integers"],
            )
        return index


def _codes(texts: pa.DictionaryArray) -> Int64Array:
    """int64 [n], a dictionary's codes; -1 where null."""
    codes: Int64Array = texts.indices.cast(pa.int64()).fill_null(-1).to_numpy()
    return codes


def _cuts(sizes: Int64Array, max_rows: int, max_bytes: int) -> list[tuple[int, int]]:
    """Row ranges of at most `max_rows` rows and `max_bytes` bytes, but of one row at least."""
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
