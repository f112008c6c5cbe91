"""A server without a model and without its tokenizer, for measuring the rest."""

from __future__ import annotations

import pyarrow as pa
import pytest
from pyarrow import flight

import fletcher
from fletcher.errors import ModelMismatchError
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


def test_null_vectors_never_get_into_a_dataset_of_a_model(start_server: StartServer) -> None:
    server = start_server()
    table = pa.table({"text": ["a", "b"]})
    options = fletcher.EmbedCommand(dataset="d")
    with fletcher.connect(server.address) as client:
        name = client.put(table, options).model
        assert name.startswith("null-")
        store = server.service.delivery.stores["default"]
        assert server.service.delivery.flush(30)
        rows = store.scan("d").read_all().combine_chunks().to_batches()[0]
        assert rows.schema.metadata[b"fletcher.model"].decode() == name
        metadata = {
            **rows.schema.metadata,
            b"fletcher.model": name.removeprefix("null-").encode(),
        }
        store.open_writer("real", rows.schema.with_metadata(metadata), "append").close()
        with pytest.raises(ModelMismatchError, match=f"is {name}, dataset `real`"):
            client.put(table, fletcher.EmbedCommand(dataset="real"))
