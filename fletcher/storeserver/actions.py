"""Longbow's requests in JSON, answered from a store: tickets, searches, deletions, readiness."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.command import DATASET_PATTERN, check_dataset
from fletcher.core.quantization import VectorReader
from fletcher.errors import (
    ColumnTypeError,
    InvalidCommandError,
    RequestError,
    UnknownDatasetError,
)
from fletcher.stores import protocol as wire
from fletcher.stores.base import Filter
from fletcher.stores.exact_search import (
    MAX_K,
    Scores,
    check_query,
    cosine,
    nearest,
    unknown_dataset,
)
from fletcher.stores.filters import parse_filters, quoted, quoted_name
from fletcher.stores.lance.store import LanceStore
from fletcher.storeserver.group_commit import Ingest
from fletcher.util.durable import sync_path

DEFAULT_K = 10
Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    """One search as Longbow's clients ask it."""

    dataset: str
    vectors: npt.NDArray[np.float32]
    k: int
    filters: tuple[Filter, ...]
    text_query: str
    alpha: float
    include_vectors: bool
    columns: tuple[str, ...] | None

    @classmethod
    def from_json(cls, fields: Body, *, dataset: str | None = None) -> Query:
        """A query from a search object.

        Raises:
            InvalidCommandError: A field is absent or of another type.
        """
        vectors = fields.get("vectors")
        rows = vectors if vectors is not None else [fields.get("vector")]
        try:
            matrix = np.asarray(rows, np.float32)
        except (ValueError, TypeError):
            matrix = np.empty(0, np.float32)
        if matrix.ndim != 2 or not matrix.size:
            raise InvalidCommandError(
                "`vector` is not a list of numbers (or `vectors` a list of such, all of one "
                "length); give the query's embedding",
                field="vector",
            )
        k = fields.get("k", DEFAULT_K)
        if type(k) is not int or not 1 <= k <= MAX_K:
            raise InvalidCommandError(
                f"`k` is {json.dumps(k)[:50]}, expected an integer from 1 to {MAX_K}", field="k"
            )
        alpha = fields.get("alpha", 1.0)
        if type(alpha) not in (int, float) or not 0 <= alpha <= 1:
            raise InvalidCommandError(
                f"`alpha` is {json.dumps(alpha)[:50]}, expected 0 (text) to 1 (vector)",
                field="alpha",
            )
        columns = _text_list(fields, "columns") if "columns" in fields else None
        return cls(
            dataset=_text(fields, "dataset", dataset),
            vectors=matrix,
            k=k,
            filters=parse_filters(fields.get("filters")),
            text_query=_text(fields, "text_query", ""),
            alpha=float(alpha),
            include_vectors=fields.get("include_vectors") is True,
            columns=None if columns is None else tuple(columns),
        )


@dataclass(frozen=True, slots=True)
class DoGetTicket:
    """What a DoGet asks for: rows of a dataset, or a search in it."""

    dataset: str
    filters: tuple[Filter, ...] = ()
    columns: tuple[str, ...] | None = None
    limit: int | None = None
    search: Query | None = None

    @classmethod
    def parse(cls, ticket: bytes) -> DoGetTicket:
        """A ticket: a JSON object or the bare name of a dataset.

        Raises:
            InvalidCommandError: Neither.
        """
        text = ticket.decode(errors="replace").strip()
        if DATASET_PATTERN.fullmatch(text):
            return cls(text)
        fields = wire.decode_object(ticket or b"?", "a ticket")
        name = fields.get("name", fields.get("dataset"))
        search = fields.get("search")
        if search is not None:
            if not isinstance(search, dict):
                raise InvalidCommandError("`search` is no JSON object", field="search")
            outer = name if isinstance(name, str) else None
            query = Query.from_json({"filters": fields.get("filters"), **search}, dataset=outer)
            check_dataset(query.dataset)
            return cls(query.dataset, search=query)
        dataset = _text({"name": name} if name is not None else {}, "name")
        check_dataset(dataset)
        limit = fields.get("limit")
        if limit is not None and (type(limit) is not int or limit < 0):
            raise InvalidCommandError("`limit` is no whole number from 0", field="limit")
        columns = _text_list(fields, "columns") if "columns" in fields else None
        return cls(
            dataset,
            filters=parse_filters(fields.get("filters")),
            columns=None if columns is None else tuple(columns),
            limit=limit,
        )


class Actions:
    """The actions of a store server by name.

    Args:
        store: What is read.
        ingest: What is written through.
        meta_port: Told to clients that ask for the capabilities.
    """

    def __init__(self, store: LanceStore, ingest: Ingest, folder: Path) -> None:
        self._store = store
        self._ingest = ingest
        self._namespaces = _Namespaces(folder / "namespaces.json")
        self.meta_port = 0
        self.data: dict[str, tuple[str, Callable[[Body], list[bytes]]]] = {
            "VectorSearch": ("Nearest rows; an Arrow IPC stream a vector", self.vector_search),
            "VectorSearchByID": ("Rows nearest to a stored row", self._search_by_id),
            "HybridSearch": ("Rows by vector and by words", self._hybrid_search),
            "delete": ("Deletes rows by id", self._delete),
            "delete-vector": ("Deletes a row by its numeric id", self._delete_vector),
            "delete-dataset": ("Deletes a dataset", self._delete_dataset),
            "check_readiness": ("Whether a dataset can be searched", self._check_readiness),
            wire.CAPABILITIES: ("What this store can do beyond Longbow", self._capabilities),
            wire.MISSING_KEYS: ("Batch keys that are not stored", self._missing_keys),
            wire.STORED_RANGES: ("Row offsets of an upload that are stored", self._stored_ranges),
        }
        self.meta: dict[str, tuple[str, Callable[[Body], list[bytes]]]] = {
            **self.data,
            "CreateNamespace": ("Makes a namespace", self._namespaces.create),
            "DeleteNamespace": ("Removes a namespace", self._namespaces.delete),
            "ListNamespaces": ("All namespaces", self._namespaces.names),
            "GetTotalNamespaceCount": ("How many namespaces there are", self._namespaces.count),
        }

    def search(self, query: Query, index: int = 0) -> pa.Table:
        """The answer to one of a query's vectors: `id`, `score`, and what else it asks for."""
        columns = list(query.columns) if query.columns is not None else ["id"]
        if query.include_vectors and "vector" not in columns:
            columns.append("vector")
        vector = query.vectors[index]
        if query.text_query and query.alpha < 1:
            return self._hybrid(query, vector, columns)
        return self._store.search(
            query.dataset, vector, k=query.k, columns=columns, filters=query.filters
        )

    def vector_search(self, body: Body) -> list[bytes]:
        """An Arrow IPC stream for every query vector."""
        query = Query.from_json(body)
        return [_ipc(self.search(query, index)) for index in range(len(query.vectors))]

    def _hybrid(
        self, query: Query, vector: npt.NDArray[np.float32], columns: list[str]
    ) -> pa.Table:
        info = self._store.dataset(query.dataset)
        if info is None:
            raise unknown_dataset(query.dataset)
        reader = check_query(query.dataset, info.schema, vector, query.k)
        if "text" not in info.schema.names:
            raise ColumnTypeError(
                f"dataset `{query.dataset}` has no column `text` to search for words; leave "
                "`text_query` out",
                field="text_query",
            )
        read = list(dict.fromkeys([*columns, "text", "vector"]))
        return nearest(
            self._store.scan(query.dataset, columns=read, filters=query.filters),
            _mixed(cosine(vector, reader), query.text_query, query.alpha),
            k=query.k,
            columns=columns,
        )

    def _search_by_id(self, body: Body) -> list[bytes]:
        dataset = _text(body, "dataset")
        schema = self._schema(dataset)
        same = Filter("id", "=", _id_value(body.get("id"), schema))
        rows = self._store.scan(dataset, columns=["vector"], filters=[same], limit=1).read_all()
        if not rows.num_rows or not rows["vector"][0].is_valid:
            raise RequestError(f"dataset `{dataset}` has no vector under that `id`", field="id")
        column = rows["vector"].combine_chunks()
        vector = VectorReader.of(schema).directions(column)[0].tolist()
        found = self.search(Query.from_json({**body, "vector": vector, "vectors": None}))
        answer = {"ids": found["id"].to_pylist(), "scores": found["score"].to_pylist()}
        return [json.dumps(answer).encode()]

    def _hybrid_search(self, body: Body) -> list[bytes]:
        query = Query.from_json({"alpha": 0.5, **body})
        schema = self._schema(query.dataset)
        columns = [name for name in ("id", "metadata") if name in schema.names]
        wanted = {**body, "columns": columns}
        found = self.search(Query.from_json({"alpha": 0.5, **wanted}))
        answer = [
            {
                "ID": row["id"],
                "Distance": 1.0 - row["score"],
                "Score": row["score"],
                "Metadata": row.get("metadata"),
                "Vector": row["vector"] if query.include_vectors else None,
            }
            for row in found.to_pylist()
        ]
        return [json.dumps(answer, ensure_ascii=False).encode()]

    def _delete(self, body: Body) -> list[bytes]:
        return self._delete_where(_text(body, "dataset"), body.get("id"))

    def _delete_vector(self, body: Body) -> list[bytes]:
        number = body.get("vector_id")
        if type(number) is not int:
            raise InvalidCommandError("`vector_id` is no whole number", field="vector_id")
        return self._delete_where(_text(body, "dataset"), number)

    def _delete_where(self, dataset: str, row_id: Any) -> list[bytes]:
        value = _id_value(row_id, self._schema(dataset))
        literal = quoted(value) if isinstance(value, str) else str(value)
        condition = f"{quoted_name('id')} = {literal}"
        if not self._ingest.call(dataset, lambda one: one.delete_rows(condition)):
            raise RequestError(f"dataset `{dataset}` has no row with that `id`", field="id")
        return [b"deleted"]

    def _delete_dataset(self, body: Body) -> list[bytes]:
        dataset = _text(body, "dataset")
        self._schema(dataset)
        self._ingest.call(dataset, lambda one: one.delete_dataset())
        return [b"deleted"]

    def _check_readiness(self, body: Body) -> list[bytes]:
        answer: dict[str, Any]
        if body.get("dataset"):
            info = self._store.dataset(_text(body, "dataset"))
            if info is None:
                answer = {"status": "NOT_FOUND", "reason": "no such dataset", "index_len": 0}
            else:
                answer = {"status": "READY", "reason": "", "index_len": info.num_rows}
        else:
            rows = sum(info.num_rows for info in self._store.datasets())
            answer = {"status": "READY", "reason": "", "index_len": rows}
        return [json.dumps(answer).encode()]

    def _capabilities(self, _: Body) -> list[bytes]:
        can = self._store.capabilities
        answer = {
            "server": "fletcher store",
            "dtypes": list(can.dtypes),
            "null_vectors": can.null_vectors,
            "upsert": can.upsert,
            "drops_repeated_keys": True,
            "durable": can.durable,
            "meta_port": self.meta_port,
        }
        return [json.dumps(answer).encode()]

    def _missing_keys(self, body: Body) -> list[bytes]:
        keys = _text_list(body, "batch_keys")
        dataset = self._known(body)
        missing = self._ingest.call(dataset, lambda one: one.missing_keys(keys))
        return [json.dumps({"missing": missing}).encode()]

    def _stored_ranges(self, body: Body) -> list[bytes]:
        upload_id = _text(body, "upload_id")
        dataset = self._known(body)
        ranges = self._ingest.call(dataset, lambda one: one.stored_ranges(upload_id))
        return [json.dumps({"ranges": ranges}).encode()]

    def _known(self, body: Body) -> str:
        dataset = _text(body, "dataset")
        self._schema(dataset)
        return dataset

    def _schema(self, dataset: str) -> pa.Schema:
        check_dataset(dataset)
        info = self._store.dataset(dataset)
        if info is None:
            raise unknown_dataset(dataset)
        return info.schema


class _Namespaces:
    """Names that Longbow's clients may keep; they group nothing here."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mutex = threading.Lock()

    def create(self, body: Body) -> list[bytes]:
        name = _text(body, "name")
        check_dataset(name)
        with self._mutex:
            self._write(sorted({*self._read(), name}))
        return [b"created"]

    def delete(self, body: Body) -> list[bytes]:
        name = _text(body, "name")
        with self._mutex:
            names = self._read()
            if name not in names:
                raise UnknownDatasetError(f"there is no namespace `{name[:128]}`", field="name")
            names.remove(name)
            self._write(names)
        return [b"deleted"]

    def names(self, _: Body) -> list[bytes]:
        return [json.dumps({"namespaces": self._read()}).encode()]

    def count(self, _: Body) -> list[bytes]:
        return [json.dumps({"count": len(self._read())}).encode()]

    def _read(self) -> list[str]:
        try:
            return list(json.loads(self._path.read_text()))
        except FileNotFoundError:
            return []

    def _write(self, names: list[str]) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(names))
        sync_path(str(temporary))
        os.replace(temporary, self._path)  # noqa: PTH105


def _mixed(dense: Scores, words: str, alpha: float) -> Scores:
    """Alpha * cosine + (1 - alpha) * share of the query's words that the text has."""
    asked = set(words.casefold().split())

    def scores(batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        texts = (text or "" for text in batch.column("text").to_pylist())
        shares = [len(asked & set(text.casefold().split())) / max(len(asked), 1) for text in texts]
        return (alpha * dense(batch) + (1 - alpha) * np.asarray(shares)).astype(np.float32)

    return scores


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _id_value(value: Any, schema: pa.Schema) -> str | int:
    """An id from JSON as the dataset's type has it: "7" finds the number 7, and 7 finds "7"."""
    kind = schema.field("id").type if "id" in schema.names else pa.null()
    if type(value) not in (str, int) or value == "":
        raise InvalidCommandError("`id` is missing: a string or a whole number", field="id")
    if not pa.types.is_integer(kind):
        return str(value)
    try:
        return int(pa.scalar(int(value), kind).as_py())
    except (ValueError, OverflowError):
        raise ColumnTypeError(f"`id` is {value!r}, the dataset's are {kind}", field="id") from None


def _text(fields: Body, name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise InvalidCommandError(
            f"`{name}` is {json.dumps(value, default=repr)[:100]}, expected a string", field=name
        )
    return value


def _text_list(fields: Body, name: str) -> list[str]:
    value = fields.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidCommandError(f"`{name}` is no list of strings", field=name)
    return value
