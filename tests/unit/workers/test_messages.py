"""What crosses the pipe arrives as it was, large arrays and small ones."""

from __future__ import annotations

import threading
from multiprocessing import Pipe

import numpy as np
import pytest

from fletcher.core.batches import InferenceResult, MicroBatch, Spans
from fletcher.workers.messages import Response, WorkerRequest, encode, receive, send


def through(message):
    ours, theirs = Pipe()
    with ours, theirs:
        # More than a pipe holds: the other end has to read meanwhile.
        writer = threading.Thread(target=send, args=(ours, encode(message)))
        writer.start()
        answer = receive(theirs)
        writer.join(10)
        assert not writer.is_alive()
    return answer


@pytest.mark.parametrize("num_rows", [0, 1, 3, 2000])
def test_arrays_arrive_as_they_were(num_rows):
    ids = np.arange(num_rows * 7, dtype=np.int32)
    lengths = np.full(num_rows, 7, np.int32)
    request = through(WorkerRequest(5, MicroBatch(ids, lengths)))
    assert request.job_id == 5
    assert np.array_equal(request.payload.input_ids, ids)
    assert request.payload.input_ids.dtype == np.int32
    vectors = np.random.default_rng(0).random((num_rows, 384), np.float32)
    answer = through(Response(6, InferenceResult(vectors, lengths.astype(np.float32), 0.5), 1.0))
    assert np.array_equal(answer.payload.embeddings, vectors)
    assert answer.payload.embeddings.shape == (num_rows, 384)
    assert answer.seconds == 1.0


def test_short_arrays_arrive_aligned_for_what_reads_their_memory():
    batch = through(
        WorkerRequest(5, MicroBatch(np.arange(7, dtype=np.int32), np.ones(7, np.int32)))
    )
    result = InferenceResult(np.ones((2, 3), np.float32), np.ones(2, np.float32), 0.5)
    answer = through(Response(6, result, 1.0))
    for array in (
        *(batch.payload.input_ids, batch.payload.lengths),
        *(answer.payload.embeddings, answer.payload.norms),
    ):
        assert array.flags.aligned


def test_arrays_of_other_types_arrive_as_they_were():
    vectors = np.random.default_rng(0).random((2, 4))
    for result in (
        InferenceResult(vectors, None, 0.5),
        InferenceResult(vectors.astype(np.float32), vectors[:, 0], 0.5),
    ):
        found = through(Response(6, result, 1.0)).payload
        for name in ("embeddings", "norms"):
            ours, theirs = getattr(result, name), getattr(found, name)
            assert np.array_equal(ours, theirs)
            assert ours is None or ours.dtype == theirs.dtype
    ids = np.arange(7, dtype=np.int64)
    batch = through(WorkerRequest(5, MicroBatch(ids, np.full(1, 7, np.int32)))).payload
    assert np.array_equal(batch.input_ids, ids)


@pytest.mark.parametrize("num_rows", [1, 2000])
def test_float16_arrives_as_such(num_rows):
    ids, lengths = np.arange(num_rows, dtype=np.int32), np.ones(num_rows, np.int32)
    request = through(WorkerRequest(5, MicroBatch(ids, lengths, half=True)))
    assert request.payload.half
    vectors = np.random.default_rng(0).random((num_rows, 384)).astype(np.float16)
    answer = through(Response(6, InferenceResult(vectors, lengths.astype(np.float32), 0.5), 1.0))
    assert answer.payload.embeddings.dtype == np.float16
    assert np.array_equal(answer.payload.embeddings, vectors)


@pytest.mark.parametrize("num_tokens", [7, 9000])
def test_segments_arrive_with_their_rows(num_tokens):
    ids, one = np.arange(num_tokens, dtype=np.int32), np.ones(1, np.int32)
    spans = Spans(one * 2, np.array([[0, 3], [3, num_tokens]], np.int32))
    batch = MicroBatch(ids, one * num_tokens, spans=spans)
    found = through(WorkerRequest(5, batch)).payload
    assert np.array_equal(found.input_ids, ids)
    assert np.array_equal(found.spans.counts, spans.counts)
    assert np.array_equal(found.spans.bounds, spans.bounds)


def test_large_arrays_are_not_copied_into_the_pickle():
    vectors = np.zeros((1000, 384), np.float32)
    encoded = encode(vectors)
    assert len(encoded.head) < 1000
    assert np.shares_memory(np.frombuffer(encoded.arrays[0], np.float32), vectors)
    assert not encode(np.zeros(8)).arrays


def test_slices_and_other_orders_arrive_too():
    whole = np.arange(200_000, dtype=np.int64).reshape(400, 500)
    for array in (whole[::2], whole.T, whole[:, :7]):
        assert np.array_equal(through(array), array)


def test_a_peer_that_goes_in_the_middle_of_an_array_is_gone():
    ours, theirs = Pipe()
    with theirs:
        encoded = encode(np.zeros(100_000))
        ours.send_bytes(encoded.head)
        ours.close()
        with pytest.raises(EOFError):
            receive(theirs)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_short_runs_arrive_whole_and_are_no_pickles(num_rows, normed):
    ids, lengths = np.arange(num_rows * 5, dtype=np.int32), np.full(num_rows, 5, np.int32)
    request = WorkerRequest(2**40, MicroBatch(ids, lengths, 6), urgent=True)
    assert b"MicroBatch" not in encode(request).head
    arrived = through(request)
    assert (arrived.job_id, arrived.urgent, arrived.payload.layers) == (2**40, True, 6)
    assert np.array_equal(arrived.payload.input_ids, ids)
    assert np.array_equal(arrived.payload.lengths, lengths)
    vectors = np.random.default_rng(0).random((num_rows, 9), np.float32)
    norms = np.arange(num_rows, dtype=np.float32) if normed else None
    response = Response(3, InferenceResult(vectors, norms, 0.25, 512), 0.5)
    assert b"InferenceResult" not in encode(response).head
    arrived = through(response)
    assert (arrived.job_id, arrived.seconds) == (3, 0.5)
    assert (arrived.payload.compute_s, arrived.payload.budget_tokens) == (0.25, 512)
    assert np.array_equal(arrived.payload.embeddings, vectors)
    assert arrived.payload.embeddings.shape == vectors.shape
    assert (arrived.payload.norms is None) == (not normed)
    assert not normed or np.array_equal(arrived.payload.norms, norms)


@pytest.mark.parametrize(
    "result",
    [
        InferenceResult(np.ones((3, 2), np.float32), None, 0.0, counts=np.array([1, 2], np.int32)),
        InferenceResult(np.ones(4, np.float32), None, 0.0),
        InferenceResult(np.ones((2, 2), np.float32), np.ones((2, 1), np.float32), 0.0),
    ],
)
def test_answers_of_another_shape_arrive_as_they_were(result):
    arrived = through(Response(1, result, 0.0)).payload
    for name in ("embeddings", "norms", "counts"):
        one, other = getattr(result, name), getattr(arrived, name)
        assert (one is None) == (other is None)
        assert one is None or (one.shape == other.shape and np.array_equal(one, other))
