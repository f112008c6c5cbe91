"""The default model over DoExchange gives what sentence-transformers gives, in any company."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import flight

from fletcher.config.server import ServeConfig
from fletcher.errors import BackendError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.runtime import Runtime
from tests.integration.flight_calls import exchange

TESTS = Path(__file__).parents[1]
SHARED = TESTS.parents[1] / "shared" / "golden" / "minilm.parquet"
SAMPLE = TESTS / "golden" / "minilm.parquet"
ORDER = np.random.default_rng(7)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Tolerance:
    """How far vectors may be from the reference, and a row's from its own in other company."""

    cosine: float
    mean_cosine: float
    error: float
    company_cosine: float
    company_error: float


FLOAT32 = Tolerance(0.99999, 0.99999, 1e-4, 0.99999, 1e-5)
BFLOAT16 = Tolerance(0.999, 0.9999, 1.0, 0.9999, 1.0)


@dataclass(frozen=True)
class Answer:
    """Vectors of one pass, in the reference's order."""

    embeddings: np.ndarray
    token_count: list[int]
    truncated: list[bool]


@pytest.fixture(scope="module")
def reference() -> pa.Table:
    return pq.read_table(SHARED if SHARED.exists() else SAMPLE)


@pytest.fixture(
    scope="module",
    params=[
        ("onnxruntime", "float32", FLOAT32),
        ("openvino", "float32", FLOAT32),
        ("openvino", "bfloat16", BFLOAT16),
    ],
    ids=lambda param: "-".join(param[:2]),
)
def engine(
    request: pytest.FixtureRequest, default_bundle: ModelBundle
) -> Iterator[tuple[Runtime, Tolerance]]:
    backend, precision, tolerance = request.param
    config = ServeConfig.from_options(
        port=0,
        home=default_bundle.folder.parent.parent,
        model=default_bundle.name,
        backend=backend,
        precision=precision,
        device="cpu",
        store=("none",),
    )
    runtime = Runtime(config)
    try:
        runtime.start()
    except BackendError as error:
        if precision == "bfloat16" and error.field == "precision":
            pytest.skip(f"no bfloat16 on this host: {error.message}")
        raise
    with runtime:
        yield runtime, tolerance


def embed(address: str, table: pa.Table, batch_rows: int) -> Answer:
    """One pass over all rows in shuffled order, in one stream."""
    order = ORDER.permutation(table.num_rows)
    shuffled = table.select(["text"]).take(pa.array(order)).combine_chunks()
    batches = shuffled.to_batches(max_chunksize=batch_rows)
    with flight.connect(address) as client:
        answers = exchange(client, batches, shuffled.schema, dtype="float32")
    assert [batch.num_rows for batch, _ in answers] == [batch.num_rows for batch in batches]
    assert not any(metadata["errors"] for _, metadata in answers)
    whole = pa.Table.from_batches([batch for batch, _ in answers]).combine_chunks()
    whole = whole.take(pa.array(np.argsort(order)))
    vectors = whole.column("vector").combine_chunks()
    assert vectors.null_count == 0
    return Answer(
        vectors.flatten().to_numpy().reshape(len(vectors), -1),
        whole.column("token_count").to_pylist(),
        whole.column("truncated").to_pylist(),
    )


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.einsum("rd,rd->r", one.astype(np.float64), other.astype(np.float64)) / lengths


def test_vectors_equal_the_reference_alone_and_in_any_batch(
    engine: tuple[Runtime, Tolerance], reference: pa.Table
) -> None:
    runtime, tolerance = engine
    expected = reference.column("embedding").combine_chunks().flatten().to_numpy()
    expected = expected.reshape(reference.num_rows, -1)
    answers = [
        embed(runtime.address, reference, batch_rows) for batch_rows in (1, 7, reference.num_rows)
    ]
    for answer in answers:
        assert answer.token_count == reference.column("token_count").to_pylist()
        assert answer.truncated == reference.column("truncated").to_pylist()
        likeness = cosines(answer.embeddings, expected)
        assert likeness.min() >= tolerance.cosine
        assert likeness.mean() >= tolerance.mean_cosine
        assert np.abs(answer.embeddings - expected).max() <= tolerance.error
    alone = answers[0].embeddings
    for answer in answers[1:]:
        assert cosines(alone, answer.embeddings).min() >= tolerance.company_cosine
        assert np.abs(alone - answer.embeddings).max() <= tolerance.company_error
