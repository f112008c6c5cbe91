"""Batch windows: tokenized texts that are planned together, and their vectors.

All texts of a batch window lie in one flat array of token ids, one row for each text. A micro-batch
is a set of these rows. The vectors of all micro-batches are written to one array, in the order of
the rows. Every ticket gets its slice of that array.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from fletcher.core.batches import (
    BoolArray,
    EmbeddingBatch,
    FloatArray,
    InferenceResult,
    Int32Array,
    Int64Array,
    MicroBatch,
    Spans,
    TokenBatch,
    VectorArray,
)
from fletcher.errors import FletcherError, InternalError
from fletcher.pipeline.stream import EmbedStream, StreamTicket
from fletcher.vectors.finite import not_finite_error, rows_not_finite
from fletcher.vectors.ragged import places, scatter_rows, spans_of, starts_of

Plan = Callable[[Int32Array], list[Int64Array]]


class BatchWindow:
    """Tickets whose texts are planned together.

    Args:
        tickets: Tokenized tickets with the same model, exit layer and type of vectors. Either all
            of them have spans, or none has.
        dim: Width of the vectors.
        plan: Divides rows, given their lengths, into micro-batches. It does not get rows of length
            0, which are failed texts.

    Attributes:
        row_sets: Indices of the rows of each micro-batch.
        streams: Streams of the tickets.
    """

    def __init__(self, tickets: Sequence[StreamTicket], dim: int, plan: Plan) -> None:
        token_batches = [ticket.tokens for ticket in tickets if ticket.tokens is not None]
        assert len(token_batches) == len(tickets)
        self.tickets = tickets
        self.streams = {ticket.stream for ticket in tickets}
        self._layers = tickets[0].texts.layers
        self._half = tickets[0].texts.half
        self._dtype = np.dtype(np.float16 if self._half else np.float32)
        self._dim = dim
        self._input_ids: Int32Array = _joined([tokens.input_ids for tokens in token_batches])
        lengths = _joined([np.diff(tokens.offsets) for tokens in token_batches])
        self._lengths: Int32Array = lengths.astype(np.int32)
        self._starts: Int64Array = np.concatenate(([0], np.cumsum(lengths)))
        num_texts = (tokens.num_texts for tokens in token_batches)
        self._first_rows = list(accumulate(num_texts, initial=0))
        late = [tokens.spans for tokens in token_batches if tokens.spans is not None]
        self._spans = _all_spans(late)
        # Index of each row's first vector. A row has one vector, or one for each of its spans.
        self._vector_starts: Int64Array = np.arange(len(lengths) + 1)
        if self._spans is not None:
            self._vector_starts = np.concatenate(([0], np.cumsum(self._spans.counts)))
        present = np.flatnonzero(self._lengths)
        row_sets = plan(self._lengths[present]) if len(present) else []
        self.row_sets: list[Int64Array] = [present[rows] for rows in row_sets]
        self._embeddings: VectorArray | None = None
        self._norms: FloatArray | None = None
        self._ragged: list[tuple[Int64Array, FloatArray, Int32Array]] = []  # several vectors a row
        self._errors: dict[int, FletcherError] = {}
        self._remaining = len(self.row_sets)
        self._lock = threading.Lock()

    def micro_batch(self, rows: Int64Array) -> MicroBatch:
        if len(self._lengths) == 1:
            return MicroBatch(self._input_ids, self._lengths, self._layers, self._spans, self._half)
        lengths = self._lengths[rows]
        ends = np.cumsum(lengths)
        # Token i of the output comes from position i + shift[i] of the window's tokens. The shift
        # is a row's start in the window minus its start in the output.
        shift = np.repeat(self._starts[rows] - (ends - lengths), lengths)
        spans = None if self._spans is None else spans_of(self._spans, rows)
        input_ids = self._input_ids[np.arange(ends[-1]) + shift]
        return MicroBatch(input_ids, lengths, self._layers, spans, self._half)

    def wanted_rows(self, rows: Int64Array) -> Int64Array | None:
        """Returns the rows of a planned micro-batch whose streams are open. Thread-safe.

        The others need no vector, because nobody waits for them. If no row is left, the micro-batch
        counts as done, and the answer is None.
        """
        closed = [ticket.stream.closed for ticket in self.tickets]
        if not any(closed):
            return rows
        owners = np.searchsorted(self._first_rows, rows, side="right") - 1
        wanted: Int64Array = rows[~np.array(closed)[owners]]
        if len(wanted):
            return wanted
        self._finish_run()
        return None

    def take_result(self, rows: Int64Array, result: InferenceResult | FletcherError) -> None:
        """Takes the vectors or the error of a run. Thread-safe.

        The result of the last run finishes all tickets.
        """
        with self._lock:
            error = result if isinstance(result, FletcherError) else self._store(rows, result)
            if error is not None:
                self._errors.update(dict.fromkeys(rows.tolist(), error))
            elif not isinstance(result, FletcherError):
                self._add_row_errors(rows, result)
        self._finish_run()

    def _finish_run(self) -> None:
        with self._lock:
            self._remaining -= 1
            if self._remaining:
                return
        self.finish_tickets()

    def finish_tickets(self) -> None:
        """Gives every ticket of an open stream its slice of the vectors.

        Rows of closed streams may have no vectors, which must not reach the embedding cache.
        """
        starts, counts = self._vector_starts, None
        embeddings = self._embeddings
        if self._ragged:
            embeddings, counts = scatter_rows(len(self._lengths), self._dim, self._ragged)
            starts = np.concatenate(([0], np.cumsum(counts)))
        elif embeddings is None:
            embeddings = np.zeros((starts[-1], self._dim), self._dtype)
        for index, ticket in enumerate(self.tickets):
            if ticket.stream.closed:
                continue
            first, last = self._first_rows[index], self._first_rows[index + 1]
            begin, end = starts[first], starts[last]
            tokens = ticket.tokens
            assert tokens is not None
            errors = {
                row - first: error for row, error in self._errors.items() if first <= row < last
            }
            if tokens.spans is not None:
                ticket.finish(self._span_result(tokens, embeddings[begin:end], errors, begin))
                continue
            truncated: BoolArray = tokens.truncated
            ticket.finish(
                EmbeddingBatch(
                    embeddings=embeddings[begin:end],
                    norms=None if self._norms is None else self._norms[first:last],
                    token_count=self._lengths[first:last],
                    truncated=truncated,
                    errors={**tokens.errors, **errors},
                    counts=None if counts is None else counts[first:last],
                    chunks=tokens.chunks,
                )
            )

    def _span_result(
        self,
        tokens: TokenBatch,
        embeddings: VectorArray,
        errors: dict[int, FletcherError],
        begin: int,
    ) -> EmbeddingBatch:
        """Result of a ticket with spans: one vector for each span, as if it were a text."""
        assert tokens.spans is not None
        counts, bounds = tokens.spans.counts, tokens.spans.bounds
        starts = starts_of(counts)
        lost = {
            place: error
            for row, error in errors.items()
            for place in range(int(starts[row]), int(starts[row] + counts[row]))
        }
        return EmbeddingBatch(
            embeddings=embeddings,
            norms=None if self._norms is None else self._norms[begin : begin + len(bounds)],
            token_count=bounds[:, 1] - bounds[:, 0],
            truncated=np.zeros(len(bounds), np.bool_),
            errors=lost,
            chunks=tokens.chunks,
        )

    def _store(self, rows: Int64Array, result: InferenceResult) -> FletcherError | None:
        """Puts vectors in their places; returns an error if their shape is wrong."""
        if result.counts is not None:
            vectors = np.asarray(result.embeddings, np.float32)
            return self._store_ragged(rows, vectors, result.counts)
        targets = rows
        if self._spans is not None:
            targets = places(self._vector_starts[rows], self._spans.counts[rows])
        expected = (len(targets), self._dim)
        norms = len(targets) if result.norms is None else result.norms.size
        if result.embeddings.shape != expected or norms != len(targets):
            return InternalError(
                f"a replica answered with vectors of shape {result.embeddings.shape} and {norms} "
                f"norms, expected {expected}"
            )
        if len(self._lengths) == 1:
            self._embeddings, self._norms = result.embeddings, result.norms
            return None
        if self._embeddings is None:
            self._embeddings = np.zeros((self._vector_starts[-1], self._dim), self._dtype)
        self._embeddings[targets] = result.embeddings
        if result.norms is not None:
            if self._norms is None:
                self._norms = np.zeros(self._vector_starts[-1], np.float32)
            self._norms[targets] = result.norms.reshape(-1)
        return None

    def _add_row_errors(self, rows: Int64Array, result: InferenceResult) -> None:
        """Records the rows that the engine failed on, or whose vectors are not finite."""
        counts = result.counts
        if counts is None and self._spans is not None:
            counts = self._spans.counts[rows]
        found = rows_not_finite(result.embeddings, result.norms, counts)
        if found:
            error = not_finite_error(self._dtype.name)
            self._errors.update({int(rows[place]): error for place in found})
        if result.errors:
            self._errors.update({int(rows[place]): one for place, one in result.errors.items()})

    def _store_ragged(
        self, rows: Int64Array, vectors: FloatArray, counts: Int32Array
    ) -> FletcherError | None:
        """Keeps vectors until all runs are done.

        Only then is the number of vectors of every row known, and with it each row's place.
        """
        expected = (int(counts.sum()), self._dim)
        if len(counts) != len(rows) or vectors.shape != expected:
            return InternalError(
                f"a replica answered with vectors of shape {vectors.shape} for {len(counts)} rows, "
                f"expected {expected} for {len(rows)}"
            )
        self._ragged.append((rows, vectors, counts))
        return None


def _joined(arrays: list[Any]) -> Any:
    """Concatenates arrays; copies nothing if there is only one."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _all_spans(parts: list[Spans]) -> Spans | None:
    if not parts:
        return None
    return Spans(_joined([one.counts for one in parts]), _joined([one.bounds for one in parts]))


def alike(tickets: Iterable[StreamTicket], few: int) -> Iterable[list[StreamTicket]]:
    """Groups tickets that use the same graph and get the same type of vectors.

    Streams with at most `few` tokens here are together, apart from those with more. So they need
    not wait for the end of a large window.
    """
    tickets, tokens = list(tickets), Counter[EmbedStream]()
    for ticket in tickets:
        assert ticket.tokens is not None
        tokens[ticket.stream] += len(ticket.tokens.input_ids)
    found: dict[tuple[int, bool, bool, bool], list[StreamTicket]] = {}
    for ticket in tickets:
        texts = ticket.texts
        late = texts.chunking is not None and texts.chunking.late
        key = (texts.layers, late, texts.half, tokens[ticket.stream] <= few)
        found.setdefault(key, []).append(ticket)
    return found.values()
