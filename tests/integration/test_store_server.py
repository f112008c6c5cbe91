"""`fletcher store`, as a real process and in this one, by plain pyarrow and by `FlightStore`."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import flight

from fletcher.core.similarity import Similarity
from fletcher.errors import (
    ConfigError,
    DimensionMismatchError,
    InvalidCommandError,
    ModelMismatchError,
    RequestError,
    StoreError,
    StoreUnavailableError,
    UnknownDatasetError,
)
from fletcher.stores.address import open_store
from fletcher.stores.base import Comparison
from fletcher.stores.staging import INCARNATION, is_replaced_by, staged_name
from fletcher.storeserver.server import StoreServer
from tests.doubles import store_rows as rows
from tests.doubles.list_search import check_list_search
from tests.integration.store_calls import DEADLINE, act, get, put

MAIN = "import sys; from fletcher.cli import main; sys.exit(main())"
COMMAND = [sys.executable, "-X", "faulthandler", "-c", MAIN, "store"]


@contextmanager
def store_process(folder: Path):
    """A store process on free ports: (process, data client, meta client)."""
    command = [*COMMAND, "--path", str(folder), "--port", "0", "--meta-port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        ready = json.loads(process.stdout.readline())
        with (
            flight.connect(ready["address"]) as data,
            flight.connect(ready["meta_address"]) as meta,
        ):
            yield process, data, meta
    finally:
        process.kill()
        process.communicate()


def ingest(client, dataset, *batches):
    """Sends batches by the acknowledged way; answers the acknowledgements."""
    descriptor = flight.FlightDescriptor.for_path("ingest", dataset)
    writer, reader = client.do_exchange(descriptor, DEADLINE)
    acks = []
    with writer:
        writer.begin(batches[0].schema)
        for batch in batches:
            writer.write_batch(batch)
        writer.done_writing()
        acks += [json.loads(reader.read_chunk().app_metadata.to_pybytes()) for _ in batches]
    return acks


def plain(first, count, id_type=None):
    """Rows as Longbow's own client sends them."""
    ids = range(first, first + count)
    values = pa.array(rows.vectors(first, count).reshape(-1))
    return pa.record_batch(
        {
            "id": pa.array(ids, id_type) if id_type else pa.array([f"id{row}" for row in ids]),
            "vector": pa.FixedSizeListArray.from_arrays(values, 8),
            "timestamp": pa.array(ids, pa.timestamp("ns")),
            "text": pa.array([f"red fox {row}" if row % 2 else f"blue sea {row}" for row in ids]),
            "metadata": pa.array([json.dumps({"row": row}) for row in ids]),
        }
    )


def test_put_get_and_list(store_server, data, meta, name):
    sent = [plain(0, 100), plain(100, 50)]
    put(data, name, *sent)
    everything = pa.Table.from_batches(sent)
    for client in (data, meta):
        assert get(client, name.encode()).equals(everything)
        assert get(client, {"name": name}).num_rows == 150
    one = get(data, {"dataset": name, "filters": [{"field": "id", "op": "eq", "value": "id120"}]})
    assert one["metadata"].to_pylist() == ['{"row": 120}']
    either = [
        {"field": "id", "operator": "==", "value": "id3"},
        {"field": "text", "operator": "=", "value": "blue sea 4", "logic": "or"},
    ]
    assert get(data, {"name": name, "filters": either})["id"].to_pylist() == ["id3", "id4"]
    info = meta.get_flight_info(flight.FlightDescriptor.for_path(name), DEADLINE)
    assert info.total_records == 150
    assert info.schema.names == everything.schema.names
    assert info.endpoints[0].locations[0].uri.decode().endswith(f":{store_server.port}")
    assert name in [one.descriptor.path[0].decode() for one in meta.list_flights(options=DEADLINE)]


def test_exchange_acknowledges_every_batch_in_order(data, name):
    acks = ingest(data, name, *[plain(first, 7) for first in range(0, 70, 7)])
    assert acks == [{"status": "acked", "batch_id": n, "rows": 7} for n in range(1, 11)]
    assert get(data, name.encode()).num_rows == 70


def test_an_idle_store_acknowledges_before_more_is_sent(data, name):
    descriptor = flight.FlightDescriptor.for_path("ingest", name)
    writer, reader = data.do_exchange(descriptor, DEADLINE)
    with writer:
        writer.begin(plain(0, 1).schema)
        for number in range(3):
            writer.write_batch(plain(number, 1))
            ack = json.loads(reader.read_chunk().app_metadata.to_pybytes())
            assert ack == {"status": "acked", "batch_id": number + 1, "rows": 1}
            assert get(data, name.encode()).num_rows == number + 1
        writer.done_writing()


def test_vector_search_every_way(data, name):
    put(data, name, plain(0, 200))
    query = rows.vectors(42, 1)[0]
    cosines = rows.vectors(0, 200) @ query
    best = [f"id{row}" for row in np.argsort(-cosines)[:3]]
    search = {"dataset": name, "vector": query.tolist(), "k": 3, "score": "cosine"}

    found = get(data, {"name": name, "search": search})
    assert found.column_names == ["id", "score"]
    assert found["id"].to_pylist() == best
    np.testing.assert_allclose(found["score"].to_numpy(), np.sort(cosines)[::-1][:3], atol=1e-5)

    (stream,) = act(data, "VectorSearch", {**search, "include_vectors": True})
    found = pa.ipc.open_stream(io.BytesIO(stream)).read_all()
    assert found["id"].to_pylist() == best
    np.testing.assert_allclose(found["vector"][0].as_py(), query, atol=1e-6)
    both = act(data, "VectorSearch", {"dataset": name, "vectors": rows.vectors(5, 2).tolist()})
    firsts = [pa.ipc.open_stream(one).read_all()["id"][0].as_py() for one in both]
    assert firsts == ["id5", "id6"]

    asked = pa.record_batch(
        {
            "dataset": pa.array([name, name]),
            "k": pa.array([3, 1], pa.int32()),
            "ef": pa.array([50, 50], pa.int32()),
            "query_vector": pa.FixedSizeListArray.from_arrays(
                pa.array(rows.vectors(42, 2).reshape(-1)), 8
            ),
        }
    )
    writer, reader = data.do_exchange(
        flight.FlightDescriptor.for_command(b"VectorSearch"), DEADLINE
    )
    with writer:
        writer.begin(asked.schema)
        writer.write_batch(asked)
        writer.done_writing()
        answers = [chunk.data["id"].to_pylist() for chunk in reader]
    assert answers == [best, ["id43"]]

    (answer,) = act(data, "VectorSearchByID", {"dataset": name, "id": "id42", "k": 3})
    assert json.loads(answer)["ids"] == best


def test_hybrid_search_mixes_words_and_vectors(data, name):
    put(data, name, plain(0, 100))
    query = {"dataset": name, "vector": rows.vectors(10, 1)[0].tolist(), "k": 5}
    (dense,) = act(data, "HybridSearch", {**query, "text_query": "red fox", "alpha": 1.0})
    (sparse,) = act(data, "HybridSearch", {**query, "text_query": "Red FOX", "alpha": 0.0})
    (mixed,) = act(data, "HybridSearch", {**query, "text_query": "sea 33", "alpha": 0.01})
    dense, sparse, mixed = (json.loads(one) for one in (dense, sparse, mixed))
    assert dense[0]["ID"] == "id10"
    assert set(dense[0]) == {"ID", "Distance", "Score", "Metadata", "Vector"}
    assert dense[0]["Metadata"] == '{"row": 10}'
    assert {int(one["ID"][2:]) % 2 for one in sparse} == {1}
    assert [one["Score"] for one in sparse] == [1.0] * 5
    assert mixed[0]["Score"] >= mixed[-1]["Score"]


def test_numeric_ids_and_deletions(data, name):
    put(data, name, plain(0, 10, pa.int64()))
    search = {"dataset": name, "vector": rows.vectors(3, 1)[0].tolist(), "k": 1}
    assert get(data, {"search": search})["id"].to_pylist() == [3]
    assert act(data, "delete", {"dataset": name, "id": "3"}) == [b"deleted"]
    assert get(data, {"search": search})["id"].to_pylist() != [3]
    assert act(data, "delete-vector", {"dataset": name, "vector_id": 4}) == [b"deleted"]
    assert get(data, name.encode())["id"].to_pylist() == [0, 1, 2, 5, 6, 7, 8, 9]
    with pytest.raises(flight.FlightInternalError, match="id '3' not found in dataset"):
        act(data, "delete", {"dataset": name, "id": "3"})
    with pytest.raises(flight.FlightInternalError, match="int64"):
        act(data, "delete", {"dataset": name, "id": "3 OR 1=1"})
    ready = json.loads(act(data, "check_readiness", {"dataset": name})[0])
    assert ready == {"status": "READY", "index_len": 8}
    assert act(data, "delete-dataset", {"dataset": name}) == [b"deleted"]
    gone = json.loads(act(data, "check_readiness", {"dataset": name})[0])
    assert gone == {"status": "NOT_FOUND", "reason": "dataset not found"}
    put(data, name, plain(0, 3))
    assert get(data, name.encode()).num_rows == 3


def test_a_repeated_key_is_stored_once(data, name):
    batch = rows.batch(0, 10)
    put(data, name, batch)
    put(data, name, batch, rows.batch(10, 5))
    assert ingest(data, name, batch)[0]["status"] == "acked"
    assert ingest(data, name, rows.batch(15, 5), rows.batch(15, 5))[1]["status"] == "acked"
    assert get(data, name.encode())["id"].to_pylist() == [f"id{row}" for row in range(20)]


def test_a_table_that_a_client_sliced_is_stored_whole(data, name):
    batch = rows.batch(0, 100)
    put(data, name, *[batch.slice(first, 30) for first in range(0, 100, 30)])
    put(data, name, *[batch.slice(first, 30) for first in range(0, 100, 30)])
    assert get(data, name.encode())["id"].to_pylist() == [f"id{row}" for row in range(100)]


def test_an_announced_group_is_stored_whole_or_not_at_all(data, name):
    batch = rows.batch(0, 100)
    group = json.dumps({"group_rows": 100}).encode()
    with pytest.raises(flight.FlightInternalError, match="ended within a group: 50 rows"):
        put(data, name, batch.slice(0, 50), metadata=group)
    put(data, name, batch.slice(0, 50), batch.slice(50), metadata=group)
    put(data, name, batch.slice(0, 50), batch.slice(50), metadata=group)
    assert get(data, name.encode()).num_rows == 100


def test_many_streams_share_commits_and_every_ack_is_true(store_server, data, name):
    def stream(number: int) -> None:
        with flight.connect(store_server.address) as client:
            batches = [rows.batch(first, 5, upload=f"u{number}") for first in range(0, 100, 5)]
            assert len(ingest(client, name, *batches)) == 20

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(stream, range(8)))
    table = get(data, name.encode())
    assert table.num_rows == 800
    counts = table["batch_key"].value_counts().field("counts").to_pylist()
    assert counts == [5] * 160


def test_one_clients_bad_rows_do_not_harm_its_neighbours(store_server, data, name):
    nan = rows.batch(0, 4)
    field = nan.schema.field("vector")
    values = pa.array(np.full(32, np.nan, np.float16))
    vectors = pa.FixedSizeListArray.from_arrays(values, type=field.type)
    bad = nan.set_column(1, field, vectors)
    start = threading.Barrier(6)

    def good(number: int) -> None:
        with flight.connect(store_server.address) as client:
            start.wait()
            ingest(client, name, *[rows.batch(n * 4, 4, upload=f"g{number}") for n in range(5)])

    def nonsense(number: int) -> None:
        with flight.connect(store_server.address) as client:
            start.wait()
            ack = ingest_and_fail(client, name, bad)
            assert ack["status"] == "error"
            assert "NaN" in ack["message"]

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(good, n) for n in range(3)] + [
            pool.submit(nonsense, n) for n in range(3)
        ]:
            done.result(timeout=30)
    assert get(data, name.encode()).num_rows == 60


def ingest_and_fail(client, dataset, batch):
    """The answer to a batch that is refused; the call then ends with the same error."""
    descriptor = flight.FlightDescriptor.for_path("ingest", dataset)
    writer, reader = client.do_exchange(descriptor, DEADLINE)
    writer.begin(batch.schema)
    writer.write_batch(batch)
    answer = json.loads(reader.read_chunk().app_metadata.to_pybytes())
    writer.done_writing()
    with pytest.raises(flight.FlightInternalError, match="NaN"):
        reader.read_chunk()
    with pytest.raises(flight.FlightInternalError, match="NaN"):
        writer.close()
    return answer


NONSENSE = {
    "garbage ticket": lambda c, d: get(c, b"\xff\x00{{"),
    "empty ticket": lambda c, d: get(c, b""),
    "ticket is a list": lambda c, d: get(c, [1]),
    "no dataset": lambda c, d: get(c, {"filters": []}),
    "unknown dataset": lambda c, d: get(c, b"nobody"),
    "path as dataset": lambda c, d: get(c, {"name": "../../etc"}),
    "unknown column": lambda c, d: get(c, {"name": d, "filters": [{"field": "x", "value": 1}]}),
    "unknown operator": lambda c, d: get(
        c, {"name": d, "filters": [{"field": "id", "op": "like", "value": "x"}]}
    ),
    "filters no list": lambda c, d: get(c, {"name": d, "filters": {"a": 1}}),
    "filter of another type": lambda c, d: get(
        c, {"name": d, "filters": [{"field": "id", "value": {"a": 1}}]}
    ),
    "negative limit": lambda c, d: get(c, {"name": d, "limit": -1}),
    "k of zero": lambda c, d: get(c, {"search": {"dataset": d, "vector": [1] * 8, "k": 0}}),
    "k a string": lambda c, d: act(c, "VectorSearch", {"dataset": d, "vector": [1] * 8, "k": "3"}),
    "wrong width": lambda c, d: act(c, "VectorSearch", {"dataset": d, "vector": [1, 2]}),
    "vector of text": lambda c, d: act(c, "VectorSearch", {"dataset": d, "vector": "abc"}),
    "ragged vectors": lambda c, d: act(c, "VectorSearch", {"dataset": d, "vectors": [[1], [1, 2]]}),
    "zero vector": lambda c, d: act(
        c, "VectorSearch", {"dataset": d, "vector": [0] * 8, "score": "cosine"}
    ),
    "no vector": lambda c, d: act(c, "VectorSearch", {"dataset": d}),
    "body no JSON": lambda c, d: act(c, "VectorSearch", b"\xff"),
    "deep JSON": lambda c, d: act(c, "VectorSearch", b"[" * 100_000),
    "alpha of two": lambda c, d: act(
        c, "HybridSearch", {"dataset": d, "vector": [1] * 8, "alpha": 2, "text_query": "x"}
    ),
    "unknown action": lambda c, d: act(c, "format-disk"),
    "unknown id": lambda c, d: act(c, "VectorSearchByID", {"dataset": d, "id": "nobody"}),
    "delete without id": lambda c, d: act(c, "delete", {"dataset": d}),
    "delete-dataset of none": lambda c, d: act(c, "delete-dataset", {"dataset": "nobody"}),
    "put without path": lambda c, d: _put_command(c),
    "put to a bad name": lambda c, d: put(c, "a/b", plain(0, 1)),
    "put without id": lambda c, d: put(c, d, plain(0, 1).drop_columns(["id"])),
    "put without vector": lambda c, d: put(c, d, plain(0, 1).drop_columns(["vector"])),
    "put of another width": lambda c, d: put(c, d, rows.batch(0, 1, dims=9)),
    "put of another type": lambda c, d: put(c, d, plain(0, 1, pa.int64())),
    "put of damaged text": lambda c, d: put(c, d, _damaged()),
    "put of a damaged name": lambda c, d: put(c, d, _misnamed()),
    "put of damaged metadata": lambda c, d: put(
        c, d, plain(0, 1).replace_schema_metadata({b"k": b"\xff"})
    ),
    "exchange of nothing": lambda c, d: _exchange(c, flight.FlightDescriptor.for_path("x")),
    "exchange to a bad name": lambda c, d: _exchange(
        c, flight.FlightDescriptor.for_path("ingest", "a b")
    ),
    "search exchange of rows": lambda c, d: _search_exchange(c),
}


def _put_command(client):
    writer, _ = client.do_put(
        flight.FlightDescriptor.for_command(b"x"), plain(0, 1).schema, DEADLINE
    )
    with writer:
        writer.write_batch(plain(0, 1))


def _exchange(client, descriptor):
    writer, reader = client.do_exchange(descriptor, DEADLINE)
    with writer:
        writer.begin(plain(0, 1).schema)
        writer.done_writing()
        reader.read_chunk()


def _search_exchange(client):
    writer, reader = client.do_exchange(
        flight.FlightDescriptor.for_command(b"VectorSearch"), DEADLINE
    )
    with writer:
        writer.begin(plain(0, 1).schema)
        writer.write_batch(plain(0, 1))
        writer.done_writing()
        reader.read_chunk()


def _misnamed():
    good = plain(0, 1)
    field = pa.field("x", pa.struct([("nested", pa.int8())]))
    wire = pa.schema([*good.schema, field]).serialize().to_pybytes()
    schema = pa.ipc.read_schema(pa.py_buffer(wire.replace(b"nested", b"nes\x80ed")))
    return pa.RecordBatch.from_arrays([*good.columns, pa.nulls(1, schema.types[-1])], schema=schema)


def _damaged():
    good = plain(0, 1)
    text = pa.Array.from_buffers(
        pa.utf8(), 1, [None, pa.py_buffer(np.array([0, 3], np.int32)), pa.py_buffer(b"\xff\xfea")]
    )
    return good.set_column(3, good.schema.field("text"), text)


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_gets_a_clear_error_and_harms_nobody(data, what):
    if json.loads(act(data, "check_readiness", {"dataset": "sane"})[0])["status"] != "READY":
        put(data, "sane", plain(0, 20))
    with pytest.raises((flight.FlightError, pa.ArrowException)) as caught:
        NONSENSE[what](data, "sane")
    error = caught.value
    assert isinstance(error, flight.FlightError), repr(error)
    assert "Traceback" not in str(error)
    assert "/" not in json.loads(error.extra_info)["message"].replace("a/b", "").replace(
        "../../etc", ""
    )
    assert get(data, b"sane").num_rows == 20


@pytest.fixture
def store(store_server):
    store = open_store(
        store_server.address, timeout_s=30
    )  # the meta port comes from its capabilities
    yield store
    store.close()


@pytest.mark.parametrize(
    ("output", "dtype"),
    [("sparse", "float32"), ("sparse", "float16"), ("multi", "float16"), ("multi", "int8")],
)
def test_sparse_and_token_vectors_are_kept_and_searched(
    store_server, data, store, name, output, dtype
):
    assert store.capabilities.outputs == ("dense", "sparse", "multi")
    batches = [rows.list_batch(first, 30, output, dtype) for first in (0, 30)]
    with closing(store.open_writer(name, batches[0].schema, "append")) as writer:
        for batch in (*batches, batches[0]):  # the last one is a repeat
            writer.append([batch])
    with closing(store.open_writer(name, batches[0].schema, "upsert")) as writer:
        newer = rows.list_batch(25, 10, output, dtype)
        writer.append([newer])
    sent = pa.Table.from_batches([batches[0].slice(0, 25), newer, batches[1].slice(5)])
    found = store.scan(name).read_all()
    assert found.schema.metadata.items() >= sent.schema.metadata.items()
    for column in {*sent.schema.names} - {"timestamp"}:
        assert found.sort_by("id")[column].to_pylist() == sent.sort_by("id")[column].to_pylist()
    check_list_search(store, name, sent, output)
    # By a stored row, by the exchange, and with words.
    (answer,) = act(data, "VectorSearchByID", {"dataset": name, "id": "id3", "k": 4})
    similarity = Similarity.from_schema(sent.schema)
    (row,) = sent.filter(pc.equal(sent["id"], "id3")).combine_chunks().to_batches()
    (query,) = similarity.queries(row)
    best = store.search(name, query, k=4, columns=["id"])
    assert json.loads(answer)["ids"] == best["id"].to_pylist()
    column = pa.array([query.tolist()])
    descriptor = flight.FlightDescriptor.for_command(b"VectorSearch")
    writer, reader = data.do_exchange(descriptor, DEADLINE)
    with writer:
        asked = pa.record_batch({"dataset": [name], "k": [4], "query_vector": column})
        writer.begin(asked.schema)
        writer.write_batch(asked)
        writer.done_writing()
        assert reader.read_all()["id"].to_pylist() == best["id"].to_pylist()
    field = "token_vectors" if output == "multi" else "vector"
    asked = {"dataset": name, field: query.tolist(), "text_query": "text 6", "alpha": 0, "k": 1}
    (answer,) = act(data, "HybridSearch", asked)
    assert json.loads(answer)[0]["ID"] == "id6"  # which has no vector
    with pytest.raises(DimensionMismatchError):
        store.search(name, np.ones((2, 8), np.float32) if output == "sparse" else query[0], k=1)
    bad = batches[0].set_column(
        1, batches[0].schema.field(1), pa.array([[None]] * 30, batches[0].schema.field(1).type)
    )
    with pytest.raises(flight.FlightInternalError, match="row 0 of a batch"):
        put(data, name, bad)
    staged = staged_name(name, "u")
    with closing(store.open_writer(staged, newer.schema, "append")) as writer:
        writer.append([newer])
    store.replace_dataset(name, staged)
    assert store.scan(name).read_all()["vector"].to_pylist() == newer["vector"].to_pylist()


def test_a_store_of_before_keeps_one_vector_per_row(store, name, monkeypatch):
    # Its capabilities name no outputs.
    can = {"dtypes": ["float32"], "null_vectors": True, "upsert": True}
    can |= {"drops_repeated_keys": True, "durable": True}
    answer = json.dumps(can).encode()
    monkeypatch.setattr(store._connection, "run_action", lambda *_: answer)
    assert store.capabilities.outputs == ("dense",)
    with pytest.raises(DimensionMismatchError, match="this store keeps one per row"):
        store.search(name, np.ones((2, 8), np.float32), k=1)


def test_a_flight_store_keeps_types_keys_and_nulls(store_server, name):
    store = open_store(store_server.address, timeout_s=30, message_bytes=2048)
    assert store.capabilities.drops_repeated_keys
    assert store.capabilities.durable
    writer = store.open_writer(name, rows.schema(), "append")
    assert store.dataset(name).num_rows == 0
    batches = [rows.batch(0, 300, null_rows=(5,)), rows.batch(300, 20)]
    writer.append(batches)
    writer.append(batches)  # a retry after a doubtful send
    assert writer.missing_keys(["u:0-299", "u:300-319", "u:320-330"]) == ["u:320-330"]
    writer.close()
    assert store.stored_ranges(name, "u") == [(0, 319)]
    assert store.stored_ranges("nobody", "u") == []
    stored = store.scan(name).read_all().combine_chunks()
    assert stored == pa.Table.from_batches(batches).combine_chunks()
    info = store.dataset(name)
    assert len(info.schema.metadata[INCARNATION]) == 32
    assert info.schema.metadata.items() - rows.schema().metadata.items() == {
        (INCARNATION, info.schema.metadata[INCARNATION])
    }
    assert info.num_rows == 320
    assert store.dataset("nobody") is None
    assert name in [one.name for one in store.datasets()]
    found = store.search(
        name,
        rows.vectors(7, 1)[0],
        k=2,
        columns=["id", "text"],
        filters=[Comparison("id", "!=", "id7")],
    )
    assert found.column_names == ["id", "text", "score"]
    assert found["id"][0].as_py() != "id7"
    assert store.search(name, rows.vectors(7, 1)[0], k=1).column_names == [
        *rows.schema().names,
        "score",
    ]
    assert store.scan(name, columns=["id"], limit=3).read_all().num_rows == 3
    store.close()


def test_a_flight_store_passes_refusals_on(store, name):
    store.open_writer(name, rows.schema(), "append").append([rows.batch(0, 3)])
    with pytest.raises(ModelMismatchError):
        store.open_writer(name, rows.schema(model="other@1"), "append")
    with pytest.raises(DimensionMismatchError):
        store.open_writer(name, rows.schema(dims=9), "append")
    with pytest.raises(UnknownDatasetError):
        store.scan("nobody").read_all()
    with pytest.raises(UnknownDatasetError):
        store.search("nobody", rows.vectors(0, 1)[0], k=1)
    with pytest.raises(RequestError, match="`k`"):
        store.search(name, rows.vectors(0, 1)[0], k=0)
    staged, others = staged_name(name, "u"), [one.name for one in store.datasets()]
    store.open_writer(staged, rows.schema(dims=9), "append").append([rows.batch(0, 2, dims=9)])
    assert [one.name for one in store.staged_datasets()] == [staged]
    assert [one.name for one in store.datasets()] == others
    assert store.dataset(name).num_rows == 3
    store.replace_dataset(name, staged)
    assert store.dataset(name).num_rows == 2
    assert is_replaced_by(store.incarnation(name), "u")
    assert store.staged_datasets() == []
    with pytest.raises(UnknownDatasetError):
        store.replace_dataset(name, staged)
    with pytest.raises(InvalidCommandError, match="`staged`"):
        store.replace_dataset(name, "other")
    assert store.dataset(name).num_rows == 2
    upserts = store.open_writer(name, rows.schema(dims=9), "upsert")
    upserts.append([rows.batch(0, 2, dims=9, text="late"), rows.batch(2, 1, dims=9)])
    assert sorted(store.scan(name).read_all()["text"].to_pylist()) == ["late 0", "late 1", "text 2"]
    store.delete_dataset(name)
    with pytest.raises(UnknownDatasetError):
        store.delete_dataset(name)


def test_acknowledged_rows_survive_kill_9(tmp_path):
    acked = []
    with store_process(tmp_path / "s") as (process, data, _):
        descriptor = flight.FlightDescriptor.for_path("ingest", "d")
        writer, reader = data.do_exchange(descriptor, DEADLINE)
        writer.begin(rows.schema())

        def send() -> None:
            try:
                for first in range(0, 100_000, 50):
                    writer.write_batch(rows.batch(first, 50))
            except (flight.FlightError, pa.ArrowException, OSError):
                pass  # the server is dead, as planned

        sender = threading.Thread(target=send)
        sender.start()
        while len(acked) < 20:
            acked.append(json.loads(reader.read_chunk().app_metadata.to_pybytes()))
        process.send_signal(signal.SIGKILL)
        process.wait()
        sender.join()
        with pytest.raises((flight.FlightError, pa.ArrowException)):
            writer.close()
    sure = {
        f"id{row}"
        for ack in acked
        for row in range(ack["batch_id"] * 50 - 50, ack["batch_id"] * 50)
    }
    with store_process(tmp_path / "s") as (_, data, _):
        ids = get(data, b"d")["id"].to_pylist()
        assert len(set(ids)) == len(ids)
        assert sure <= set(ids)
        assert len(ids) % 50 == 0
        # Sent again from the start, every row is there once.
        put(data, "d", *[rows.batch(first, 50) for first in range(0, 2000, 50)])
        again = get(data, b"d")["id"].to_pylist()
        assert len(set(again)) == len(again)
        assert {f"id{row}" for row in range(2000)} <= set(again)


def test_sigterm_keeps_what_came_and_ends_within_a_bound(tmp_path):
    with store_process(tmp_path) as (process, data, _):
        put(data, "d", rows.batch(0, 10))
        descriptor = flight.FlightDescriptor.for_path("ingest", "d")
        writer, reader = data.do_exchange(descriptor, DEADLINE)
        writer.begin(rows.schema())
        writer.write_batch(rows.batch(10, 10))
        assert reader.read_chunk().app_metadata
        process.send_signal(signal.SIGTERM)  # with a call open that would go on
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # its threads' stacks are printed
        errors = process.stderr.read()
        assert process.wait() == 0, errors
        assert "Traceback" not in errors
        with pytest.raises((flight.FlightError, pa.ArrowException)):
            writer.close()
    assert open_store(f"lance:{tmp_path}").dataset("d").num_rows == 20


STUCK = """
import sys, threading
from fletcher.cli import main, store
from fletcher.storeserver.server import StoreServer
store.SHUTDOWN_S = store.CLOSE_S = 0.1
StoreServer.close = lambda server, timeout_s: threading.Event().wait()
sys.exit(main())
"""


@pytest.mark.parametrize(("signals", "status"), [(1, 1), (2, 128 + signal.SIGTERM)])
def test_a_store_that_cannot_close_ends_all_the_same(tmp_path, signals, status):
    ports = ["--port", "0", "--meta-port", "0"]
    command = [sys.executable, "-c", STUCK, "store", "--path", str(tmp_path), *ports]
    if signals == 2:
        command[2] = STUCK.replace("0.1", "60")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)  # two signals at once are one
        assert process.wait(timeout=20) == status


def test_a_folder_has_one_writer(tmp_path):
    with store_process(tmp_path) as (_, data, _):
        put(data, "d", rows.batch(0, 10))
        beside = open_store(f"lance:{tmp_path}")
        assert beside.dataset("d").num_rows == 10  # reading is free
        with pytest.raises(StoreUnavailableError, match="being written"):
            beside.open_writer("d", rows.schema(), "append")


def test_a_folder_has_one_server(tmp_path):
    command = [*COMMAND, "--path", str(tmp_path), "--port", "0", "--meta-port", "0"]
    with store_process(tmp_path) as (process, data, _):
        put(data, "d", rows.batch(0, 10))
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (answer.returncode, answer.stdout) == (1, "")
        assert answer.stderr.startswith(f"fletcher store: the folder {tmp_path} is served by")
        assert answer.stderr.count("\n") == 1
        process.kill()
        process.wait()
    # It died without a chance to let go.
    with store_process(tmp_path) as (_, data, meta):
        put(data, "d", rows.batch(10, 10))
        assert {info.total_records for info in meta.list_flights()} == {20}


def test_a_server_that_is_closed_or_failed_lets_its_folder_go(tmp_path):
    for _ in range(2):
        served = StoreServer(tmp_path, host="127.0.0.1", port=0, meta_port=0)
        with pytest.raises(StoreError, match="served by another"):
            StoreServer(tmp_path, host="127.0.0.1", port=0, meta_port=0)
        assert served.close(10)


def test_a_taken_port_is_named_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags in (("--port", port), ("--port", "0", "--meta-port", port)):
            command = [*COMMAND, "--path", str(tmp_path / "folder"), *flags]
            answer = subprocess.run(
                command, capture_output=True, text=True, timeout=60, check=False
            )
            assert (answer.returncode, answer.stdout) == (2, "")
            option = flags[-2].removeprefix("--").replace("-", "_")
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in answer.stderr
            assert f"`{option}`" in answer.stderr
            assert answer.stderr.count("\n") == 1
    assert not (tmp_path / "folder").exists()


def test_a_taken_port_and_an_open_host_are_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="`port`"):
            StoreServer(tmp_path, host="127.0.0.1", port=port, meta_port=0)
        with pytest.raises(ConfigError, match="`meta_port`"):
            StoreServer(tmp_path, host="127.0.0.1", port=0, meta_port=port)
        with pytest.raises(ConfigError, match="both 1"):
            StoreServer(tmp_path, host="127.0.0.1", port=1, meta_port=1)
    command = [*COMMAND, "--path", str(tmp_path), "--host", "0.0.0.0", "--port", "0"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode != 0
    assert "--insecure" in answer.stderr
