import dataclasses
import itertools

import numpy as np
import pytest

from fletcher.core.batches import InferenceResult
from fletcher.errors import BackendError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.host import HostInfo
from fletcher.tuning.candidates import TuningCandidate

HOST = HostInfo(
    cores=4,
    memory_bytes=8 << 30,
    cpu="Some CPU",
    isa=frozenset({"avx512_bf16"}),
    num_numa_nodes=1,
    num_cuda_devices=0,
    cuda_provider=False,
    openvino=True,
    onnxruntime=True,
)


@pytest.fixture
def host():
    return HOST


@pytest.fixture
def gpus():
    return dataclasses.replace(HOST, num_cuda_devices=2, cuda_provider=True, openvino=False)


@pytest.fixture
def candidate():
    """Makes a candidate of one process."""

    def make(backend="openvino", precision="bfloat16", threads=4, tokens=1024):
        return TuningCandidate(
            (BackendConfig(backend, "cpu", "folder", precision, threads, tokens),)
        )

    return make


class FakeReplicaGroup:
    """Vectors from the token ids; a clock of its own instead of work.

    Args:
        seconds: For each run, the seconds that a text takes; the last holds from then on.
        noise: How far each vector is off; NaN makes vectors without a direction.
        fails_at: The run that fails.
    """

    concurrency = 1

    def __init__(self, precision="float32", seconds=(0.01,), noise=0.0, fails_at=None):
        self.precision = precision
        self.closed = False
        self._seconds = itertools.chain(seconds[:-1], itertools.repeat(seconds[-1]))
        self._noise, self._fails_at, self._runs = noise, fails_at, itertools.count()

    def embed_batches(self, batches):
        if next(self._runs) == self._fails_at:
            raise BackendError("out of memory")
        results = []
        for batch in batches:
            starts = np.cumsum(batch.lengths) - batch.lengths
            sums = np.add.reduceat(batch.input_ids, starts)
            angle = sums.astype(np.float32) + np.float32(self._noise)
            vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1)
            results.append(InferenceResult(vectors, None, 0.0))
        return results, next(self._seconds) * sum(len(one.lengths) for one in batches)

    def close(self):
        self.closed = True


@pytest.fixture
def fake_group():
    return FakeReplicaGroup
