"""Similarity of stored vectors to queries, as the vectors' model was trained for.

A dataset's schema metadata says which one: `fletcher.similarity`, cosine if it is missing, and
`fletcher.output`. Sparse vectors are compared by their dot product. Several vectors of one text are
compared by MaxSim: each vector of the query counts its best match among the text's vectors
(https://arxiv.org/abs/2004.12832).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.quantization import FloatArray, VectorReader
from fletcher.errors import ColumnTypeError

SIMILARITY = "fletcher.similarity"
OUTPUT = "fletcher.output"
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
OUTPUTS = ("dense", "sparse", "multi")


@dataclass(frozen=True, slots=True)
class Similarity:
    """Comparison of queries with the column `vector` of batches.

    A query is float32: [dims] for dense and sparse vectors, [num_vectors, dims] for several vectors
    of a text. For sparse vectors, it has the weight of every dimension.

    Attributes:
        output: One of OUTPUTS.
        metric: One of SIMILARITIES. Distances count negative, so that the greatest score is best.
        dims: Number of dimensions.
        reader: Reader of single vectors; None for sparse ones.
    """

    output: str
    metric: str
    dims: int
    reader: VectorReader | None

    @classmethod
    def from_schema(cls, schema: pa.Schema) -> Similarity:
        """The similarity that a schema's metadata names.

        Raises:
            ColumnTypeError: The vectors are of a type that Fletcher does not write, or the metadata
                names something unknown.
        """
        said = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        metric, output = said.get(SIMILARITY, "cosine"), said.get(OUTPUT, "dense")
        if metric not in SIMILARITIES or output not in OUTPUTS:
            raise ColumnTypeError(
                f"the metadata names the similarity {metric[:100]!r} and the output "
                f"{output[:100]!r}, which this version does not know; use a newer Fletcher",
                field="vector",
            )
        if output == "dense":
            reader = VectorReader.from_schema(schema)
            return cls(output, metric, reader.dims, reader)
        kind = schema.field("vector").type if "vector" in schema.names else pa.null()
        items = kind.value_type if pa.types.is_list(kind) else pa.null()
        if output == "multi":
            one = pa.schema([("vector", items)], metadata=schema.metadata)
            reader = VectorReader.from_schema(one)
            return cls(output, metric, reader.dims, reader)
        names = [field.name for field in items] if pa.types.is_struct(items) else []
        dims = said.get("fletcher.dims", "")
        if names != ["index", "value"] or not dims.isdecimal():
            raise ColumnTypeError(
                f"`vector` is {kind}, expected lists of `index` and `value`, and `fletcher.dims` "
                "in the schema metadata",
                field="vector",
            )
        return cls(output, metric, int(dims), None)

    @property
    def name(self) -> str:
        """Name of the scores: `maxsim`, `dot` or another metric."""
        return {"sparse": "dot", "multi": "maxsim"}.get(self.output, self.metric)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that `scores` reads."""
        scaled = self.reader is not None and self.reader.scaled and self.metric != "cosine"
        return ("vector", "scale") if scaled else ("vector",)

    def queries(self, batch: pa.RecordBatch) -> list[FloatArray]:
        """The rows' vectors as queries. All rows must have a vector."""
        column = batch.column("vector")
        if self.output == "dense":
            reader = _dense(self.reader)
            return list(
                reader.directions(column) if self.metric == "cosine" else reader.vectors(batch)
            )
        lengths, first = _extents(column)
        if self.output == "multi":
            return np.split(self._tokens(batch, first, int(lengths.sum())), np.cumsum(lengths)[:-1])
        index, value = self._weights(column, first, int(lengths.sum()))
        found = np.zeros((len(column), self.dims), np.float32)
        found[np.repeat(np.arange(len(column)), lengths), index] = value
        return list(found)

    def scores(self, queries: Sequence[FloatArray], batch: pa.RecordBatch) -> FloatArray:
        """Score of each row for each query: float32 [num_queries, num_rows].

        Rows without a vector have -inf, and so have zero vectors if the metric is the cosine.
        Queries stay float32 for all types of rows, because quantizing them loses precision.
        """
        column = batch.column("vector")
        compare = {"dense": self._compare_dense, "sparse": self._compare_sparse}
        found = compare.get(self.output, self._compare_multi)(queries, batch)
        found[:, np.asarray(column.is_null())] = -np.inf
        return found

    def _compare_dense(self, queries: Sequence[FloatArray], batch: pa.RecordBatch) -> FloatArray:
        asked, reader = np.stack(queries), _dense(self.reader)
        if self.metric == "cosine":
            rows = reader.directions(batch.column("vector"))
            norms = np.linalg.norm(rows, axis=1)
            found = np.full((len(asked), len(rows)), -np.inf, np.float32)
            with np.errstate(invalid="ignore"):
                asked = asked / np.linalg.norm(asked, axis=1, keepdims=True)
            np.divide(asked @ rows.T, norms, out=found, where=norms > 0)
            return found
        rows = reader.vectors(batch)
        if self.metric == "dot":
            return np.asarray(asked @ rows.T, np.float32)
        power = 2 if self.metric == "euclidean" else 1
        return np.stack(
            [-np.linalg.norm(rows - one, ord=power, axis=1).astype(np.float32) for one in asked]
        )

    def _compare_sparse(self, queries: Sequence[FloatArray], batch: pa.RecordBatch) -> FloatArray:
        column = batch.column("vector")
        lengths, first = _extents(column)
        index, value = self._weights(column, first, int(lengths.sum()))
        rows = np.repeat(np.arange(len(column)), lengths)
        sums = [np.bincount(rows, one[index] * value, len(column)) for one in queries]
        return np.asarray(sums, np.float32).reshape(len(queries), len(column))

    def _compare_multi(self, queries: Sequence[FloatArray], batch: pa.RecordBatch) -> FloatArray:
        column = batch.column("vector")
        lengths, first = _extents(column)
        tokens = self._tokens(batch, first, int(lengths.sum()))
        if self.metric == "cosine":
            tokens = _unit(tokens)
        full = np.flatnonzero(lengths)
        found = np.full((len(queries), len(column)), -np.inf, np.float32)
        if not len(full):
            return found
        starts = np.cumsum(lengths)[full] - lengths[full]
        for place, query in enumerate(queries):  # all products at once would take gigabytes
            asked = _unit(query) if self.metric == "cosine" else query
            found[place, full] = np.maximum.reduceat(asked @ tokens.T, starts, axis=1).sum(axis=0)
        return found

    def _tokens(self, batch: pa.RecordBatch, first: int, number: int) -> FloatArray:
        """All vectors of the rows: float32 [number, dims]."""
        reader = _dense(self.reader)
        tokens = reader.directions(batch.column("vector").values.slice(first, number))
        if "scale" in self.columns:
            _, first = _extents(batch.column("scale"))
            scales = batch.column("scale").values.slice(first, number)
            tokens = tokens * scales.to_numpy(zero_copy_only=False)[:, None]
        return tokens

    def _weights(self, column: pa.Array, first: int, number: int) -> tuple[Any, FloatArray]:
        items = column.values.slice(first, number)
        index = items.field("index").to_numpy(zero_copy_only=False)
        if number and (index.min() < 0 or index.max() >= self.dims):
            raise ColumnTypeError(
                f"`vector` has a dimension outside 0 to {self.dims - 1}", field="vector"
            )
        value = items.field("value").to_numpy(zero_copy_only=False)
        return index, value.astype(np.float32)


def _dense(reader: VectorReader | None) -> VectorReader:
    assert reader is not None, "sparse vectors have no reader"
    return reader


def _extents(column: pa.Array) -> tuple[npt.NDArray[np.int64], int]:
    """Number of items of each list, and the index of the first item."""
    offsets = column.offsets.to_numpy()
    return np.diff(offsets).astype(np.int64), int(offsets[0])


def _unit(vectors: FloatArray) -> FloatArray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)
