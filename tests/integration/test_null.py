"""A server without a model and without its tokenizer, for measuring the rest."""

from __future__ import annotations

import pyarrow as pa
from pyarrow import flight

from tests.integration.conftest import StartServer
from tests.integration.flight_calls import exchange


def test_null_tokenization_is_the_same_in_the_front_process_and_in_workers(
    start_server: StartServer,
) -> None:
    server = start_server(tokenizer="null")
    # Few and interactive: the front process does them. Many: a worker.
    batches = [
        pa.record_batch({"text": [f"number {number}" for number in range(size)]})
        for size in (2, 500)
    ]
    with flight.connect(server.address) as client:
        ((few, _), (many, _)) = exchange(client, batches, batches[0].schema)
    assert few.column("token_count").to_pylist() == [3, 3]
    assert few.column("vector").equals(many.column("vector").slice(0, 2))
    assert len(set(map(tuple, many.column("vector").to_pylist()))) == 500
