"""Assembly of output batches from row slices and their vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.core.batches import BoolArray, EmbeddingBatch, Int32Array, Int64Array, VectorArray
from fletcher.core.schema import TIMESTAMP, VectorSpec, column, vector_columns
from fletcher.errors import FletcherError
from fletcher.pipeline.input.limits import INTERACTIVE_ROWS
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.interactive.single_row import is_plain, single_row_batch
from fletcher.vectors.aggregation import aggregation
from fletcher.vectors.finite import refuse_not_finite
from fletcher.vectors.pooling import finish
from fletcher.vectors.ragged import gather_rows


@dataclass(frozen=True, slots=True)
class Output:
    """Output of a row slice.

    Attributes:
        batch: Output rows, with vectors.
        errors: Errors of failed rows, by the row's index in the slice.
        offsets: int64 [num_rows + 1]. Row i of the slice gives rows offsets[i] to offsets[i + 1]
            (exclusive) of the batch. That is one row, unless rows of the output are chunks. A
            failed row also gives one row.
    """

    batch: pa.RecordBatch
    errors: dict[int, FletcherError]
    offsets: Int64Array

    def first_row(self, row: int) -> int:
        """Returns the first row of the batch that belongs to a row of the slice."""
        return int(self.offsets[row])

    def ids(self) -> dict[int, pa.Scalar]:
        """Ids of the failed rows, by the row's index in the slice."""
        ids = self.batch.column("id")
        return {row: ids[self.first_row(row)] for row in self.errors}


class Assembler:
    """Assembles one call's output batches, in order. Not thread-safe.

    Args:
        upload_id: Prefix of the ids that are made for rows without an id.

    Attributes:
        kept_bytes: Memory that the assembler holds beyond the `num_bytes` of the last row slice.
            It consists of kept parts of a text that continues, and of columns that are repeated for
            each chunk of a row.
    """

    def __init__(self, schema: pa.Schema, spec: VectorSpec, upload_id: str) -> None:
        self.schema = schema
        self.kept_bytes = 0
        self._names = schema.names
        self._is_plain = is_plain(schema, spec)
        self._spec = spec
        self._upload_id = upload_id
        self._table = _Table.zeros(0, spec.width)
        method = "mean" if spec.chunking is None else spec.chunking.aggregation
        self._aggregation = aggregation(method, normalized=spec.normalized)

    def assemble(
        self, row_slice: RowSlice, outcome: EmbeddingBatch | FletcherError
    ) -> Output | None:
        """Returns a row slice's output; None if its text continues in the next slice."""
        finished = self._finished(row_slice, outcome)
        if finished is None:
            return None
        outcome = finished
        num_rows = row_slice.num_rows
        single = self._single_row(row_slice, outcome) if self._is_plain and num_rows == 1 else None
        if single is not None:
            return Output(single, {}, np.arange(2))
        table, values = self._vectors(row_slice, outcome)
        errors = dict(row_slice.errors)
        if table.errors:
            for row, value in enumerate(row_slice.values.tolist()):
                if value in table.errors:
                    errors.setdefault(row, table.errors[value])
        missing: BoolArray = row_slice.values < 0
        if errors:
            missing[list(errors)] = True
        vectors, counts = table.vectors(values, missing, self._spec)
        columns: dict[str, Any] = {
            "id": self._ids(row_slice),
            **vector_columns(vectors, self._spec, missing, counts),
            "timestamp": column(np.full(num_rows, row_slice.timestamp_us, np.int64), TIMESTAMP),
            "token_count": pa.array(np.where(missing, 0, table.token_count[values]), pa.int32()),
            "truncated": pa.array(table.truncated[values] & ~missing),
        }
        if row_slice.stored is not None:
            columns |= row_slice.stored.fill(columns)
        for name in self._names:
            if name not in columns:
                columns[name] = self._carried(row_slice, name)
        arrays = [columns[name] for name in self._names]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        return Output(batch, errors, np.arange(num_rows + 1))

    def _single_row(
        self, row_slice: RowSlice, outcome: EmbeddingBatch | FletcherError
    ) -> pa.RecordBatch | None:
        """Returns the output of a slice with a single plain text; None for other slices."""
        if isinstance(outcome, FletcherError) or len(outcome.embeddings) != 1:
            return None
        given = row_slice.new_values is not None or "id" in row_slice.rows.schema.names
        if given or outcome.errors or row_slice.values[0]:
            return None
        identifier = f"{self._upload_id}:{row_slice.row_first}"
        return single_row_batch(
            self.schema, self._spec, identifier, row_slice.timestamp_us, outcome
        )

    def _finished(
        self, row_slice: RowSlice, outcome: EmbeddingBatch | FletcherError
    ) -> EmbeddingBatch | FletcherError | None:
        """Returns the vectors of texts, as the command asks for them.

        Returns None if the text continues in the next slice.
        """
        if row_slice.texts.chunking is None or not row_slice.texts.num_texts:
            return self._finish(outcome)
        cut = self._finish(outcome, dtype="float32")  # the type of the sum over a text's chunks
        joined = self._aggregation.add_chunks(cut, continued=row_slice.texts.continued)
        if joined is None or isinstance(joined, FletcherError):
            return joined
        return refuse_not_finite(joined, self._spec.dtype)

    def _finish(
        self, outcome: EmbeddingBatch | FletcherError, dtype: str = ""
    ) -> EmbeddingBatch | FletcherError:
        """Returns vectors with their final width and norm; errors if not finite.

        `dtype` is the type that the vectors are converted to next, by default the command's.
        """
        if isinstance(outcome, FletcherError):
            return outcome
        spec = self._spec
        if outcome.counts is None:
            embeddings = finish(
                outcome.embeddings, outcome.norms, dims=spec.dims, normalized=spec.normalized
            )
            if embeddings is not outcome.embeddings:
                outcome = replace(outcome, embeddings=embeddings)
        first = 1 if spec.output == "sparse" else 0
        return refuse_not_finite(outcome, dtype or spec.dtype, first_column=first)

    def _vectors(
        self, row_slice: RowSlice, outcome: EmbeddingBatch | FletcherError
    ) -> tuple[_Table, Int32Array]:
        """Returns the table of vectors, and int32 [num_rows] with each row's index in it.

        The index of a row without a vector is arbitrary.
        """
        num_texts = row_slice.texts.num_texts
        if row_slice.new_values is not None:
            if row_slice.new_table is not None:
                self._table = _Table.zeros(row_slice.new_table, self._spec.width)
            table = self._table
            table.set_vectors(row_slice.new_values, outcome)
        elif isinstance(outcome, FletcherError):
            table = _Table.zeros(num_texts, self._spec.width)
            table.set_vectors(np.arange(num_texts, dtype=np.int32), outcome)
        else:
            table = _Table(outcome)
        if len(table.token_count) == 0:  # no row of the slice has a text
            table = _Table.zeros(1, self._spec.width)
        return table, np.maximum(row_slice.values, 0)

    def _ids(self, row_slice: RowSlice) -> pa.Array:
        if "id" in row_slice.rows.schema.names:
            return row_slice.rows.column("id")
        first, last = row_slice.row_first, row_slice.row_first + row_slice.num_rows
        if row_slice.num_rows <= INTERACTIVE_ROWS:  # Arrow's functions are slower for few rows
            return pa.array([f"{self._upload_id}:{row}" for row in range(first, last)], pa.utf8())
        rows = pa.array(np.arange(first, last, dtype=np.int64)).cast(pa.utf8())
        return pc.binary_join_element_wise(f"{self._upload_id}:", rows, "")

    def _carried(self, row_slice: RowSlice, name: str) -> pa.Array:
        key = name if name in ("text", "metadata") else f"carried:{name}"
        array = row_slice.rows.column(key)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        return array if array.type == self._type(name) else array.cast(self._type(name))

    def _type(self, name: str) -> pa.DataType:
        return self.schema.field(name).type


class _Table:
    """Table of vectors that rows refer to by index."""

    def __init__(self, outcome: EmbeddingBatch) -> None:
        self.embeddings, self.errors = outcome.embeddings, dict(outcome.errors)
        self.token_count, self.truncated = outcome.token_count, outcome.truncated
        self._counts = outcome.counts

    @classmethod
    def zeros(cls, size: int, width: int) -> _Table:
        return cls(EmbeddingBatch.zeros(size, width))

    def vectors(
        self, rows: Int32Array, missing: BoolArray, spec: VectorSpec
    ) -> tuple[VectorArray, Int32Array | None]:
        """Returns the vectors of rows, and the number of vectors of each row.

        The numbers are None if each row has one vector. Vectors of missing rows are arbitrary, or
        left out.
        """
        if self._counts is None:
            # Vectors that need no conversion are copied here: otherwise a few of them would keep
            # all vectors of their batch window in memory.
            as_it_is = self.embeddings.dtype.name == spec.dtype
            if as_it_is or not _is_all_in_order(rows, len(self.embeddings)):
                return self.embeddings[rows], None
            return self.embeddings, None
        wanted = np.flatnonzero(~missing)
        vectors, counts = gather_rows(self.embeddings, self._counts, rows[wanted])
        spread = np.zeros(len(rows), np.int32)
        spread[wanted] = counts
        return vectors, spread

    def set_vectors(self, places: Int32Array, outcome: EmbeddingBatch | FletcherError) -> None:
        if isinstance(outcome, FletcherError):
            self.errors.update(dict.fromkeys(places.tolist(), outcome))
            return
        self.embeddings[places] = outcome.embeddings
        self.token_count[places] = outcome.token_count
        self.truncated[places] = outcome.truncated
        for index, error in outcome.errors.items():
            self.errors[int(places[index])] = error


def _is_all_in_order(values: Int32Array, size: int) -> bool:
    return len(values) == size and np.array_equal(values, np.arange(size))
