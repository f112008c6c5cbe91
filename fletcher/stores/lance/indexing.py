"""Making and measuring of a LanceDB table's indexes."""

from __future__ import annotations

import datetime as dt
import logging
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.similarity import Similarity
from fletcher.errors import InvalidCommandError
from fletcher.stores.exact_search import RowScores, check_searchable, nearest
from fletcher.stores.lance.indexes import (
    SearchSettings,
    VectorIndex,
    find_index,
    kind_name,
    write_settings,
)
from fletcher.stores.lance.library import import_lancedb
from fletcher.stores.lance.scanning import in_batches
from fletcher.stores.lance.store import METRICS, LanceStore
from fletcher.stores.lance.writer import LanceWriter, lance_errors

_log = logging.getLogger(__name__)

TYPES = ("auto", "ivf_pq", "ivf_rq", "ivf_sq", "ivf_hnsw_sq", "none")
# Below this number of rows, a search without an index takes some milliseconds.
MIN_ROWS = 10_000
GOAL = 0.995  # recall@10 of the sample, so that other queries reach 0.99
K = 10
SAMPLE_ROWS = 100
# Settings that are tried, from the fastest to the slowest.
_CANDIDATES = (4, 8, 16, 32, 64, 128)
_NPROBES = (10, 20, 40, 80, 160, 320, 640, 1280)
# Cosines that differ by less are ties: float32 rounds them differently.
_TIE = 1e-5

Queries = Sequence[npt.NDArray[np.float32]]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Recall and latency of searches for a sample of stored rows.

    Attributes:
        recall: Share of the 10 best other rows that a search with the index finds, by their scores:
            rows with equal scores count alike.
        index_ms, exact_ms: Median time of a search with the index, and of an exact one.
        num_queries: Number of sampled rows.
    """

    recall: float
    index_ms: float
    exact_ms: float
    num_queries: int


@dataclass(frozen=True, slots=True)
class IndexReport:
    """Outcome of `build_indexes`.

    Attributes:
        num_rows: Number of rows of the dataset.
        id_index: Whether the column `id` has an index now.
        index: Index on the vectors, with the settings that searches use; None: no index.
        measured: Its measurement; None without an index, or without vectors.
    """

    num_rows: int
    id_index: bool
    index: VectorIndex | None
    measured: Measurement | None


@dataclass(frozen=True, slots=True)
class OptimizeReport:
    """State of a table before or after `optimize_table`."""

    num_rows: int
    num_fragments: int
    num_versions: int
    num_unindexed: int | None
    num_bytes: int


def build_indexes(
    store: LanceStore, dataset: str, kind: str = "auto", progress: Progress = lambda _: None
) -> IndexReport:
    """Make and measure the indexes of a dataset, and store settings for searches.

    A crash leaves the dataset readable, with its old indexes or the new ones.

    Args:
        kind: One of TYPES. `auto` takes no index below MIN_ROWS, else IVF_RQ, or IVF_HNSW_SQ if the
            number of dimensions is not a multiple of 8. If their recall is below GOAL, `auto` takes
            IVF_SQ. `none` removes the index of the vectors.
        progress: Called with what is done now.

    Raises:
        InvalidCommandError: LanceDB cannot index such vectors.
        UnknownDatasetError, StoreUnavailableError: As `LanceStore.open_maintainer`.
    """
    writer = store.open_maintainer(dataset)
    try:
        similarity = check_indexable(dataset, writer.schema) if kind != "none" else None
        with lance_errors(dataset):
            return _build(writer, store.dataset_folder(dataset), kind, similarity, progress)
    finally:
        writer.close()


def check_indexable(dataset: str, schema: pa.Schema) -> Similarity:
    """The similarity of a dataset whose vectors can have an index.

    Raises:
        InvalidCommandError: LanceDB cannot index such vectors.
    """
    similarity = check_searchable(dataset, schema)
    dtype = similarity.reader.dtype if similarity.reader is not None else "float32"
    reason = None
    if similarity.output != "dense":
        reason = f"{similarity.output} vectors"
    elif dtype not in ("float32", "float16"):
        reason = f"vectors of {dtype}"
    elif similarity.metric not in METRICS:
        reason = f"the similarity {similarity.metric}"
    if reason is not None:
        raise InvalidCommandError(
            f"dataset `{dataset}` has {reason}, for which LanceDB has no index that Fletcher "
            "uses; searches compare all its rows; `--type none` makes only the index of ids",
            field="type",
            allowed=["none"],
        )
    return similarity


def optimize_table(
    store: LanceStore, dataset: str, keep: dt.timedelta
) -> tuple[OptimizeReport, OptimizeReport]:
    """Compact a dataset, add new rows to its indexes and delete old versions.

    Returns its state before and after. Raises as `LanceStore.open_maintainer`.
    """
    writer = store.open_maintainer(dataset)
    try:
        with lance_errors(dataset):
            before = _state(writer.table, store.dataset_folder(dataset))
        writer.optimize_table(keep)
        with lance_errors(dataset):
            return before, _state(writer.table, store.dataset_folder(dataset))
    finally:
        writer.close()


def _state(table: Any, folder: Path) -> OptimizeReport:
    rows, index = int(table.count_rows()), find_index(table, folder)
    return OptimizeReport(
        num_rows=rows,
        num_fragments=int(table.stats()["fragment_stats"]["num_fragments"]),
        num_versions=len(table.list_versions()),
        num_unindexed=None if index is None else max(rows - index.num_rows, 0),
        num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )


def _build(
    writer: LanceWriter,
    folder: Path,
    kind: str,
    similarity: Similarity | None,
    progress: Progress,
) -> IndexReport:
    table = writer.table
    num_rows = int(table.count_rows())
    id_index = "id" in writer.schema.names and num_rows > 0
    if id_index:
        progress("indexing ids")
        table.create_index("id", config=_library().BTree(), replace=True)
        writer.sync_files()
    index = measured = None
    if similarity is None:
        _drop_indexes(table)
    elif kind == "auto" and num_rows < MIN_ROWS:
        index = find_index(table, folder)
    else:
        for one in _kinds(kind, similarity):
            progress(f"indexing {num_rows:,} vectors ({one.upper()})")
            index, measured = _index_vectors(writer, folder, one, similarity)
            if measured.recall >= GOAL:
                break
    writer.sync_files()
    return IndexReport(num_rows, id_index, index, measured)


def _kinds(kind: str, similarity: Similarity) -> tuple[str, ...]:
    """The indexes to make until one reaches GOAL."""
    if kind != "auto":
        return (kind,)
    return ("ivf_rq" if similarity.dims % 8 == 0 else "ivf_hnsw_sq", "ivf_sq")


def _index_vectors(
    writer: LanceWriter, folder: Path, kind: str, similarity: Similarity
) -> tuple[VectorIndex, Measurement]:
    """Replace the index of the vectors, measure the new one and store its settings."""
    table, name = writer.table, f"vector-{secrets.token_hex(4)}"
    table.create_index("vector", config=_config(kind, similarity), name=name)
    writer.sync_files()
    _drop_indexes(table, but=name)
    made = next(one for one in table.list_indices() if one.name == name)
    index = VectorIndex(name, kind_name(made.index_type), int(made.num_indexed_rows or 0))
    index, measured = _measure(table, index, similarity)
    nprobes = index.nprobes or _NPROBES[-1]
    write_settings(folder, SearchSettings(name, nprobes, index.candidates, measured.recall))
    return index, measured


def _drop_indexes(table: Any, but: str | None = None) -> None:
    """Drop indexes of the vectors. A search may use any that there is."""
    for one in table.list_indices():
        if "vector" in one.columns and one.name != but:
            table.drop_index(one.name)


def _library() -> Any:
    import_lancedb()
    from lancedb import index

    return index


def _config(kind: str, similarity: Similarity) -> Any:
    index = _library()
    classes = {
        "ivf_pq": index.IvfPq,
        "ivf_rq": index.IvfRq,
        "ivf_sq": index.IvfSq,
        "ivf_hnsw_sq": index.HnswSq,
    }
    return classes[kind](distance_type=METRICS[similarity.metric])


def _measure(
    table: Any, index: VectorIndex, similarity: Similarity
) -> tuple[VectorIndex, Measurement]:
    """The index with the fastest settings that reach GOAL, and their measurement.

    With the most partitions, the fewest sufficient candidates are looked for. Then the fewest
    sufficient partitions.
    """
    queries = _sample(table, similarity)
    if not queries:
        return replace(index, nprobes=_NPROBES[0]), Measurement(1.0, 0.0, 0.0, 0)
    exact, exact_ms = _scores(table, None, similarity, queries)
    found: dict[VectorIndex, tuple[float, float]] = {}

    def recall(one: VectorIndex) -> float:
        if one not in found:
            scores, time_ms = _scores(table, one, similarity, queries)
            found[one] = _recall(scores, exact), time_ms
        return found[one][0]

    tried = [replace(index, nprobes=_NPROBES[-1], candidates=one) for one in _CANDIDATES]
    best = next((one for one in tried if recall(one) >= GOAL), None)
    best = best or max(tried, key=recall)
    goal = min(GOAL, recall(best))
    fewer = [replace(best, nprobes=one) for one in _NPROBES]
    best = next(one for one in fewer if recall(one) >= goal)
    measured, time_ms = found[best]
    return best, Measurement(measured, time_ms, exact_ms, len(queries))


def _sample(table: Any, similarity: Similarity) -> Queries:
    """Vectors of rows from all parts of the table, without nulls and zeros."""
    num_rows = int(table.count_rows())
    draw = np.random.default_rng(0)
    places = sorted(draw.choice(num_rows, min(SAMPLE_ROWS, num_rows), replace=False).tolist())
    if not places:
        return []
    rows = table.take_offsets(places).select(list(similarity.columns)).to_arrow()
    rows = rows.filter(rows.column("vector").is_valid()).combine_chunks()
    queries = [one for batch in rows.to_batches() for one in similarity.queries(batch)]
    return [one for one in queries if np.isfinite(one).all() and one.any()]


def _scores(
    table: Any, index: VectorIndex | None, similarity: Similarity, queries: Queries
) -> tuple[list[npt.NDArray[np.float32]], float]:
    """Scores of each query's K best other rows, best first, and the median time in ms."""
    scores, times = [], []
    k = K + 1  # the sampled row finds itself
    for query in queries:
        began = time.perf_counter()
        search = table.search(query, vector_column_name="vector")
        search = search.distance_type(METRICS[similarity.metric])
        search = search.select([*similarity.columns, "_distance"])
        if index is None:
            search = search.bypass_vector_index().limit(k)
        else:
            search = index.applied_to(search).limit(index.limit(k))
        rows = in_batches(search, table.schema)
        best = nearest(rows, RowScores(similarity, query), k=k, columns=())
        times.append(1000 * (time.perf_counter() - began))
        scores.append(best.column("score").to_numpy()[1:])
    return scores, statistics.median(times)


def _recall(
    found: Sequence[npt.NDArray[np.float32]], exact: Sequence[npt.NDArray[np.float32]]
) -> float:
    """Share of the exact results that were found, by score."""
    wanted = sum(map(len, exact))
    pairs = zip(found, exact, strict=True)
    hits = [int((one[: len(best)] >= best[-1] - _TIE).sum()) for one, best in pairs if len(best)]
    return sum(hits) / wanted if wanted else 1.0
