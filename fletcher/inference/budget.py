"""Loading of backends, with runs that shrink when the device is out of memory."""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fletcher.core.batches import InferenceResult, Int32Array, MicroBatch, Spans
from fletcher.errors import BackendError, FletcherError, InternalError
from fletcher.inference.backend import Backend, BackendConfig
from fletcher.inference.late import LateBackend
from fletcher.models.bundle.bundle import ModelBundle, version_folder
from fletcher.models.checkpoint.markers import Queries
from fletcher.vectors.ragged import spans_of

log = logging.getLogger(__name__)

# Messages of ONNX Runtime's arenas, CUDA, cuBLAS and OpenVINO, which share no exception class.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate|can ?not allocate|bad_alloc|smaller than requested bytes"
    r"|ALLOC_FAILED|OUT_OF_MEMORY",
    re.IGNORECASE,
)
# Number of successful runs near the budget after which the budget grows by a quarter. It grows
# because memory that other processes used may be free again. If that memory is still in use, one
# run in this many fails.
_RUNS_TO_GROW = 64


# Number of failed runs without a successful one after which an error is not a row's fault. Halving
# the most rows of a micro-batch down to the row at fault takes fewer.
_FAILURES_OF_ONE_ROW = 16


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Result of a part of a micro-batch, or the error of its only row."""

    part: MicroBatch
    result: InferenceResult | BackendError | MemoryError


class BudgetedBackend:
    """Backend that splits micro-batches by a budget of padded tokens.

    The budget is halved when the device is out of memory, and slowly grows again. A row that is
    longer than the budget runs by itself. The split does not change vectors. Fillers of queries, as
    `queries` describes them, count as tokens.

    If a run fails for another reason, its rows are run again in halves. So a row at which the
    engine fails does not fail the rows beside it.
    """

    def __init__(
        self, backend: Backend, max_batch_tokens: int, queries: Queries | None = None
    ) -> None:
        self.concurrency, self.urgent_concurrency = backend.concurrency, backend.urgent_concurrency
        self._backend = backend
        self._most = max_batch_tokens
        self._budget = max_batch_tokens
        self._queries = queries
        self._good_runs = 0
        self._lock = threading.Lock()

    def run(self, batch: MicroBatch) -> InferenceResult:
        """Embed one micro-batch, in one or several runs.

        Raises:
            BackendError: The engine failed, or its memory is too small for a single row.
        """
        if len(batch.lengths) == 0:
            return self._backend.run(batch)
        outcomes = self._outcomes(_cut(batch, self._lengths(batch), self._budget))
        result = _joined(outcomes)
        embeddings = result.embeddings
        if batch.half:
            with np.errstate(over="ignore"):  # found later: `fletcher.vectors.finite`
                embeddings = embeddings.astype(np.float16, copy=False)
        return replace(result, embeddings=embeddings, budget_tokens=self._budget)

    def describe(self) -> dict[str, str]:
        return self._backend.describe()

    def _outcomes(self, parts: list[MicroBatch]) -> list[_Outcome]:
        """Run parts of a micro-batch, and where the engine fails, halves of them.

        The halves may end at single rows.

        Raises:
            BackendError: The engine failed at every run, which is not a row's fault.
        """
        waiting, outcomes, num_failures = parts[::-1], [], 0
        while waiting:
            part = waiting.pop()
            try:
                result = self._backend.run(part)
            except (BackendError, MemoryError) as error:
                failure = error
                failure.__traceback__ = None  # it keeps the failed run's arrays
            else:
                self._grow(_padded(self._lengths(part)))
                outcomes.append(_Outcome(part, result))
                continue
            is_full = is_out_of_memory(failure)
            if is_full:
                self._shrink(_padded(self._lengths(part)))
            num_failures += not is_full or len(part.lengths) == 1
            if len(part.lengths) == 1:
                outcomes.append(_Outcome(part, _alone(part, failure) if is_full else failure))
            else:
                lengths = self._lengths(part)
                waiting += (_cut(part, lengths, self._budget) if is_full else _halves(part))[::-1]
            no_success = all(isinstance(one.result, Exception) for one in outcomes)
            if no_success and (not waiting or num_failures >= _FAILURES_OF_ONE_ROW):
                first = outcomes[0].result if outcomes else failure
                assert isinstance(first, Exception)
                raise first
        return outcomes

    def _lengths(self, batch: MicroBatch) -> Int32Array:
        """int32 [num_rows], number of tokens of each row, including its fillers."""
        if self._queries is None:
            return batch.lengths
        return self._queries.filled(batch.input_ids, batch.lengths)

    def _shrink(self, num_tokens: int) -> None:
        with self._lock:
            self._budget = max(1, min(self._budget, num_tokens // 2))
            self._good_runs = 0

    def _grow(self, num_tokens: int) -> None:
        with self._lock:
            if self._budget == self._most or num_tokens < self._budget // 2:
                return  # a small run does not show that a larger one fits
            self._good_runs += 1
            if self._good_runs >= _RUNS_TO_GROW:
                self._budget = min(self._most, self._budget + self._budget // 4 + 1)
                self._good_runs = 0


def load(config: BackendConfig) -> BudgetedBackend:
    """Load the backend of a configuration, with late chunking and a budget.

    Raises:
        FletcherError: The engine's `load` failed.
    """
    backend = LateBackend(load_engine(config), lambda: load_engine(replace(config, late=True)))
    queries = None if config.backend == "null" else ModelBundle.from_folder(_folder(config)).queries
    return BudgetedBackend(backend, config.max_batch_tokens, queries)


def _folder(config: BackendConfig) -> Path:
    if config.version:  # a restarted replica must load the same version again
        return version_folder(Path(config.bundle), config.version)
    return Path(config.bundle)


def load_inline(config: BackendConfig) -> Backend | None:
    """Load a backend that runs one small micro-batch at a time in this process.

    Returns:
        The backend; None if the engine has no such backend here.

    Raises:
        FletcherError: The engine's `load_inline` failed.
    """
    load = getattr(_engine(config), "load_inline", None)
    loaded: Backend | None = load and load(replace(config, bundle=str(_folder(config))))
    return loaded


def load_engine(config: BackendConfig) -> Backend:
    """Load the engine of a configuration without a budget.

    Raises:
        FletcherError: The engine's `load` failed.
    """
    loaded: Backend = _engine(config).load(replace(config, bundle=str(_folder(config))))
    return loaded


def _engine(config: BackendConfig) -> Any:
    return import_module(f"fletcher.inference.{config.backend}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an engine's error says that memory ran out, judged by its message."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def _padded(lengths: Int32Array) -> int:
    return int(lengths.max()) * len(lengths)


def _cut(batch: MicroBatch, run_lengths: Int32Array, budget: int) -> list[MicroBatch]:
    """Split a micro-batch into parts of neighbouring rows.

    Each part is within the budget or has a single row. `run_lengths` has the number of tokens of
    each row, including its fillers.
    """
    if _padded(run_lengths) <= budget:
        return [batch]
    edges, longest = [0], 0
    for row, length in enumerate(run_lengths.tolist()):
        longest = max(longest, length)
        if row > edges[-1] and longest * (row + 1 - edges[-1]) > budget:
            edges.append(row)
            longest = length
    return _split(batch, edges)


def _halves(batch: MicroBatch) -> list[MicroBatch]:
    return _split(batch, [0, len(batch.lengths) // 2])


def _split(batch: MicroBatch, edges: list[int]) -> list[MicroBatch]:
    """Split a micro-batch into parts; `edges` has the index of each part's first row."""
    ends = np.cumsum(batch.lengths)
    ids = np.split(batch.input_ids, ends[np.array(edges[1:], np.int64) - 1])
    lengths = np.split(batch.lengths, edges[1:])
    spans: list[Spans | None] = [None] * len(edges)
    if batch.spans is not None:
        rows = np.split(np.arange(len(batch.lengths)), edges[1:])
        spans = [spans_of(batch.spans, one) for one in rows]
    parts = zip(ids, lengths, spans, strict=True)
    return [MicroBatch(own, length, batch.layers, part, batch.half) for own, length, part in parts]


def _alone(part: MicroBatch, failure: Exception) -> BackendError:
    error = BackendError(f"the device has too little memory for a text of {part.lengths[0]} tokens")
    error.__cause__ = failure
    return error


def _joined(outcomes: list[_Outcome]) -> InferenceResult:
    """Join the results of a micro-batch's parts; a failed row gets zeros and an error."""
    good = [one.result for one in outcomes if isinstance(one.result, InferenceResult)]
    if len(outcomes) == 1:
        return good[0]
    errors: dict[int, FletcherError] = {}
    first_row, parts = 0, []
    for one in outcomes:
        if isinstance(one.result, InferenceResult):
            parts.append(one.result)
        else:
            errors[first_row] = _row_error(one.part, one.result)
            parts.append(_nothing(one.part, good[0]))
        first_row += len(one.part.lengths)
    norms = [part.norms for part in parts if part.norms is not None]
    counts = [part.counts for part in parts if part.counts is not None]
    return InferenceResult(
        np.concatenate([part.embeddings for part in parts]),
        np.concatenate(norms) if norms else None,
        sum(part.compute_s for part in parts),
        counts=np.concatenate(counts) if counts else None,
        errors=errors,
    )


def _nothing(part: MicroBatch, like: InferenceResult) -> InferenceResult:
    """Zeros for a failed row, of the kind of a result `like`."""
    num_vectors = 1 if part.spans is None else int(part.spans.counts[0])
    counts = None if like.counts is None else np.zeros(1, np.int32)
    if counts is not None:
        num_vectors = 0
    embeddings = np.zeros((num_vectors, like.embeddings.shape[1]), like.embeddings.dtype)
    norms = None if like.norms is None else np.zeros(num_vectors, np.float32)
    return InferenceResult(embeddings, norms, 0.0, counts=counts)


def _row_error(part: MicroBatch, failure: Exception) -> InternalError:
    # The engine's reason may have paths of the server, so it goes only to the log.
    log.warning("the engine fails at one text of a run: %s", failure)
    return InternalError(
        f"the engine fails at this text of {part.lengths[0]} tokens alone; the server's log has "
        "the reason"
    )
