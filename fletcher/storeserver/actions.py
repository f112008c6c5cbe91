"""Actions of the store server: searches, deletions, upload state and namespaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
from msgspec.json import encode as to_json
from msgspec.structs import replace

from fletcher.errors import (
    ColumnTypeError,
    InvalidCommandError,
    UnknownIdError,
    UnsupportedCallError,
)
from fletcher.stores import protocol
from fletcher.stores.base import Comparison, Filter, Vector, total_rows
from fletcher.stores.exact_search import (
    Scores,
    check_query,
    check_searchable,
    existing_schema,
    nearest,
)
from fletcher.stores.filters import quoted, quoted_name
from fletcher.stores.lance.store import LanceStore
from fletcher.stores.staging import check_stored, staged_for
from fletcher.storeserver.ingest import Ingest
from fletcher.storeserver.longbow_answers import METRIC, longbow_scores, longbow_table
from fletcher.storeserver.namespaces import Namespaces
from fletcher.storeserver.requests import (
    DatasetRequest,
    DeleteNamespaceRequest,
    DeleteRequest,
    DeleteVectorRequest,
    EmptyRequest,
    Filters,
    HybridSearchRequest,
    NamespaceRequest,
    ReadinessRequest,
    SearchByIdRequest,
    SearchRequest,
    decode_request,
    to_filters,
)


class Action(NamedTuple):
    """One action: the type of its request body, and the method that answers it."""

    request: type[msgspec.Struct]
    answer: Callable[[Any], list[bytes]]

    @property
    def about(self) -> str:
        """Description for ListActions: the docstring of the method `answer`."""
        return self.answer.__doc__ or ""


class Actions:
    """The actions of a store server by name. Thread-safe.

    Actions read rows from `store`. They use `ingest` for deletions and for questions about batch
    keys. The namespaces are kept in `folder`.
    """

    def __init__(self, store: LanceStore, ingest: Ingest, folder: Path) -> None:
        self.store = store
        self.ingest = ingest
        self._namespaces = names = Namespaces(folder / "namespaces.json")
        # Port number that the action `capabilities` returns. Set once both ports listen.
        self.meta_port = 0
        self.data = {
            "VectorSearch": Action(SearchRequest, self._vector_search),
            "VectorSearchByID": Action(SearchByIdRequest, self._search_by_id),
            "HybridSearch": Action(HybridSearchRequest, self._hybrid_search),
            "delete": Action(DeleteRequest, self._delete_row),
            "delete-vector": Action(DeleteVectorRequest, self._delete_vector),
            "delete-dataset": Action(DatasetRequest, self._delete_dataset),
            "DeleteNamespace": Action(DeleteNamespaceRequest, self._delete_namespace),
            "check_readiness": Action(ReadinessRequest, self._check_readiness),
            protocol.CAPABILITIES: Action(EmptyRequest, self._list_capabilities),
            protocol.MISSING_KEYS: Action(protocol.MissingKeysRequest, self._missing_keys),
            protocol.REPLACE_DATASET: Action(protocol.ReplaceDatasetRequest, self._replace_dataset),
            protocol.DELETE_UPLOAD: Action(protocol.DeleteUploadRequest, self._delete_upload),
            protocol.STORED_RANGES: Action(protocol.StoredRangesRequest, self._stored_ranges),
        }
        self.meta = {
            **self.data,
            "CreateNamespace": Action(NamespaceRequest, names.create_name),
            "ListNamespaces": Action(EmptyRequest, names.list_names),
            "GetTotalNamespaceCount": Action(EmptyRequest, names.count_names),
        }

    def search_rows(
        self, request: SearchRequest, index: int = 0, *, names: Sequence[str] | None = None
    ) -> pa.Table:
        """The rows nearest to the request's query vector at position `index`.

        The columns are `names`, else the requested ones, else `id`; and `score`. Longbow's clients
        get Longbow's ids and scores; see `longbow_answers`.
        """
        check_stored(request.dataset)
        columns = list(names or request.columns or ["id"])
        if request.include_vectors and "vector" not in columns:
            columns.append("vector")
        vector, k = request.query_vectors[index], request.k
        schema = self._schema(request.dataset)
        filters = to_filters(request.filters, schema)
        metric = self._metric(request, schema)
        if not request.text_query or request.alpha == 1:
            found = self.store.search(
                request.dataset, vector, k=k, columns=columns, filters=filters, metric=metric
            )
            if metric is not None:
                scores = longbow_scores(found["score"].to_numpy())
                found = found.set_column(len(columns), "score", pa.array(scores))
            return longbow_table(found) if request.is_longbows else found
        by_vector = check_query(request.dataset, schema, vector, k, metric=metric)
        if "text" not in schema.names:
            raise ColumnTypeError(
                f"dataset `{request.dataset}` has no column `text` to search for words; leave "
                "`text_query` out",
                field="text_query",
            )
        read = list(dict.fromkeys([*columns, "text", *by_vector.columns]))

        def similarities(batch: pa.RecordBatch) -> Vector:
            return by_vector(batch) if metric is None else longbow_scores(by_vector(batch))

        found = nearest(
            self.store.scan(request.dataset, columns=read, filters=filters),
            _mixed(similarities, request.text_query, request.alpha),
            k=k,
            columns=columns,
        )
        return longbow_table(found) if request.is_longbows else found

    def _metric(self, request: SearchRequest, schema: pa.Schema) -> str | None:
        """Similarity in place of the dataset's own; None for several or sparse vectors."""
        is_dense = check_searchable(request.dataset, schema).output == "dense"
        return METRIC if is_dense and request.is_longbows else None

    def filters_of(self, dataset: str, requests: Filters) -> tuple[Filter, ...]:
        """The filters of a request, with values of the types of the dataset's columns."""
        return to_filters(requests, self.store.read_schema(dataset) if requests else None)

    def _vector_search(self, request: SearchRequest) -> list[bytes]:
        """Nearest rows; an Arrow IPC stream per vector."""
        number = len(request.query_vectors)
        return [_to_ipc(self.search_rows(request, index)) for index in range(number)]

    def _search_by_id(self, request: SearchByIdRequest) -> list[bytes]:
        """Rows nearest to a stored row."""
        schema = self._schema(request.dataset)
        same = Comparison("id", "=", _stored_id(request.id, schema))
        similarity = check_searchable(request.dataset, schema)
        metric = self._metric(request, schema)
        if metric is not None:
            similarity = dataclasses.replace(similarity, metric=metric)
        read = similarity.columns
        rows = self.store.scan(request.dataset, columns=read, filters=[same], limit=1)
        table = rows.read_all()
        if not table.num_rows or not table["vector"][0].is_valid:
            raise UnknownIdError(
                f"id {str(request.id)[:200]!r} not found in dataset `{request.dataset}`, or it has "
                "no vector",
                field="id",
            )
        vector = similarity.queries(table.combine_chunks().to_batches()[0])[0].tolist()
        name = "token_vectors" if similarity.output == "multi" else "vector"
        query: dict[str, Any] = {"vector": None, "vectors": None, "token_vectors": None}
        found = self.search_rows(replace(request, **{**query, name: vector}), names=["id"])
        return [to_json({"ids": found["id"].to_pylist(), "scores": found["score"].to_pylist()})]

    def _hybrid_search(self, request: HybridSearchRequest) -> list[bytes]:
        """Nearest rows by vector and by words."""
        stored = self._schema(request.dataset).names
        names = [name for name in ("id", "metadata") if name in stored]
        answer = [
            {
                "ID": row["id"],
                "Distance": 0.0,  # as in Longbow
                "Score": row["score"],
                "Metadata": row.get("metadata"),
                "Vector": row["vector"] if request.include_vectors else None,
            }
            for row in self.search_rows(request, names=names).to_pylist()
        ]
        return [to_json(answer)]

    def _delete_row(self, request: DeleteRequest) -> list[bytes]:
        """Delete rows by id."""
        value = _stored_id(request.id, self._schema(request.dataset))
        literal = quoted(value) if isinstance(value, str) else str(value)
        condition = f"{quoted_name('id')} = {literal}"
        if not self.ingest.call_committer(request.dataset, lambda one: one.delete_rows(condition)):
            raise UnknownIdError(
                f"id {str(request.id)[:200]!r} not found in dataset `{request.dataset}`", field="id"
            )
        return [b"deleted"]

    def _delete_vector(self, request: DeleteVectorRequest) -> list[bytes]:
        """Delete rows by numeric id."""
        return self._delete_row(DeleteRequest(request.dataset, request.vector_id))

    def _delete_dataset(self, request: DatasetRequest) -> list[bytes]:
        """Delete a dataset."""
        self._schema(request.dataset)
        self.ingest.call_committer(request.dataset, lambda one: one.delete_dataset())
        return [b"deleted"]

    def _delete_namespace(self, request: DeleteNamespaceRequest) -> list[bytes]:
        """Delete a dataset, or with `name` a namespace."""
        if request.dataset and request.name:
            raise InvalidCommandError(
                "`dataset` and `name` are both given; give `dataset` to delete a dataset, or "
                "`name` to delete a namespace",
                field="name",
            )
        if request.name:
            return self._namespaces.delete_name(request.name)
        if not request.dataset:
            raise InvalidCommandError(
                "`dataset` is missing in the body of the action DeleteNamespace; name a dataset, "
                "or a namespace as `name`",
                field="dataset",
            )
        return self._delete_dataset(DatasetRequest(request.dataset))

    def _replace_dataset(self, request: protocol.ReplaceDatasetRequest) -> list[bytes]:
        """Replace a dataset by a staged one."""
        if staged_for(request.staged) != request.dataset:
            raise InvalidCommandError(
                f"`staged` is {request.staged[:200]!r}, expected a staged dataset of "
                f"`{request.dataset[:200]}`",
                field="staged",
            )
        self.ingest.end_committer(request.staged)
        self.ingest.call_committer(request.dataset, lambda one: one.replace_dataset(request.staged))
        return [protocol.REPLACED]

    def _check_readiness(self, request: ReadinessRequest) -> list[bytes]:
        """Whether a dataset can be searched, and its number of rows."""
        infos = [self.store.dataset(request.dataset)] if request.dataset else self.store.datasets()
        found = [info for info in infos if info is not None]
        if request.dataset and not found:
            return [to_json({"reason": "dataset not found", "status": "NOT_FOUND"})]
        return [to_json({"index_len": total_rows(found), "status": "READY"})]

    def _list_capabilities(self, _: EmptyRequest) -> list[bytes]:
        """Capabilities of this store beyond Longbow's."""
        can = self.store.capabilities
        answer = msgspec.convert(can, protocol.CapabilitiesAnswer, from_attributes=True)
        answer.server, answer.meta_port = "fletcher store", self.meta_port
        answer.drops_repeated_keys = True  # with the ledger of each committer
        return [to_json(answer)]

    def _missing_keys(self, request: protocol.MissingKeysRequest) -> list[bytes]:
        """Batch keys that are not stored."""
        self._schema(request.dataset)
        keys = request.batch_keys
        missing = self.ingest.call_committer(request.dataset, lambda one: one.missing_keys(keys))
        return [to_json(protocol.MissingKeysAnswer(missing))]

    def _delete_upload(self, request: protocol.DeleteUploadRequest) -> list[bytes]:
        """Delete the rows of an upload."""
        self._schema(request.dataset)
        num_rows = self.ingest.call_committer(
            request.dataset, lambda one: one.delete_upload(request.upload_id)
        )
        return [to_json(protocol.DeleteUploadAnswer(num_rows))]

    def _stored_ranges(self, request: protocol.StoredRangesRequest) -> list[bytes]:
        """Stored row offsets of an upload."""
        self._schema(request.dataset)
        ranges = self.ingest.call_committer(
            request.dataset, lambda one: one.stored_ranges(request.upload_id)
        )
        return [to_json(protocol.StoredRangesAnswer(ranges))]

    def _schema(self, dataset: str) -> pa.Schema:
        return existing_schema(self.store, dataset)


def answer_action(actions: dict[str, Action], name: str, body: bytes) -> list[bytes]:
    """The results of the action called `name`.

    Raises:
        UnsupportedCallError: No action has that name.
        InvalidCommandError: The body is malformed.
        FletcherError: The action failed.
    """
    action = actions.get(name)
    if action is None:
        raise UnsupportedCallError(
            f"unknown action type {name[:100]}; this port has {', '.join(actions)}",
            field="action",
            allowed=list(actions),
        )
    return action.answer(decode_request(action.request, body, f"the body of the action {name}"))


def _mixed(by_vector: Scores, words: str, alpha: float) -> Scores:
    """Scoring function: alpha * similarity + (1 - alpha) * share of found words.

    `by_vector` computes the similarities. The second term is the share of the distinct `words` that
    are in the row's text.
    """
    asked = set(words.casefold().split())

    def scores(batch: pa.RecordBatch) -> Vector:
        texts = (text or "" for text in batch.column("text").to_pylist())
        shares = [len(asked & set(text.casefold().split())) / max(len(asked), 1) for text in texts]
        found = (1 - alpha) * np.asarray(shares)
        if alpha:  # else the words alone count, also in rows without a vector
            found = found + alpha * by_vector(batch)
        return found.astype(np.float32)

    return scores


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _stored_id(value: str | int, schema: pa.Schema) -> str | int:
    """An id in the type of the dataset's ids: "7" becomes 7, or 7 becomes "7"."""
    kind = schema.field("id").type if "id" in schema.names else pa.null()
    if not pa.types.is_integer(kind):
        return str(value)
    try:
        return int(pa.scalar(int(value), kind).as_py())
    except (ValueError, OverflowError):
        raise ColumnTypeError(
            f"`id` is {value!r}, dataset ids are {kind}; give one of that type", field="id"
        ) from None
