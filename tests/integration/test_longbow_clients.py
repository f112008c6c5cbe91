"""Clients of Longbow at `fletcher store`: what they send, and what they get."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.storeserver.server import StoreServer

DEADLINE = flight.FlightCallOptions(timeout=30)
DIMS = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    served = StoreServer(tmp_path_factory.mktemp("store"), host="127.0.0.1", port=0, meta_port=0)
    yield served
    assert served.close(10)


@pytest.fixture
def data(server):
    with flight.connect(server.address) as client:
        yield client


@pytest.fixture
def meta(server):
    with flight.connect(server.meta_address) as client:
        yield client


@pytest.fixture
def name(request):
    return "".join(letter if letter.isalnum() else "_" for letter in request.node.name)[:100]


def batch(ids, **more):
    vectors = np.random.default_rng(len(ids)).standard_normal((len(ids), DIMS), np.float32)
    own = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIMS)
    times = pa.array(range(len(ids)), pa.timestamp("ns"))
    return pa.record_batch({"id": ids, "vector": own, "timestamp": times, **more})


def put(client, dataset, *batches):
    path = flight.FlightDescriptor.for_path(dataset)
    writer, _ = client.do_put(path, batches[0].schema, DEADLINE)
    with writer:
        for one in batches:
            writer.write_batch(one)


def get(client, **ticket) -> pa.Table:
    raw = flight.Ticket(json.dumps(ticket).encode())
    return client.do_get(raw, DEADLINE).read_all()


def act(client, action, body=None):
    raw = json.dumps(body or {}).encode()
    (result,) = client.do_action(flight.Action(action, raw), DEADLINE)
    return result.body.to_pybytes()


TEXTS = pa.array(["a", "b", "ü"])
TYPES_OF_TEXTS = {
    "utf8": TEXTS,
    "large_utf8": TEXTS.cast(pa.large_utf8()),
    "utf8_view": TEXTS.cast(pa.string_view()),
    "dictionary": TEXTS.dictionary_encode(),
}


@pytest.mark.parametrize("first", TYPES_OF_TEXTS)
def test_ids_of_every_type_of_text_are_stored(data, name, first):
    kind = pa.large_utf8() if first == "large_utf8" else pa.utf8()
    for ids in (TYPES_OF_TEXTS[first], *TYPES_OF_TEXTS.values()):
        put(data, name, batch(ids, word=ids))
    found = get(data, name=name)
    assert found["id"].type == found["word"].type == kind
    assert found["id"].to_pylist() == found["word"].to_pylist() == TEXTS.to_pylist() * 5
    either = [{"field": "id", "op": "in", "value": ["b", "c"]}]
    assert get(data, name=name, filters=either).num_rows == 5
    assert json.loads(act(data, "VectorSearchByID", {"dataset": name, "id": "ü", "k": 5}))["ids"]
    assert act(data, "delete", {"dataset": name, "id": "ü"}) == b"deleted"
    assert get(data, name=name)["id"].to_pylist() == ["a", "b"] * 5


@pytest.mark.parametrize("keys", TYPES_OF_TEXTS)
def test_a_repeated_key_of_every_type_of_text_is_stored_once(data, name, keys):
    groups = TYPES_OF_TEXTS[keys]
    for _ in range(2):
        put(data, name, batch(TEXTS, batch_key=groups))
    found = get(data, name=name)
    assert found["batch_key"].type == pa.utf8()
    assert found["batch_key"].to_pylist() == TEXTS.to_pylist()


@pytest.mark.parametrize("ids", TYPES_OF_TEXTS)
def test_rows_are_replaced_by_ids_of_every_type_of_text(data, name, ids):
    put(data, name, batch(TEXTS.cast(pa.large_utf8()), word=pa.array(["old"] * 3)))
    newer = batch(TYPES_OF_TEXTS[ids].slice(1), word=pa.array(["new"] * 2))
    path = flight.FlightDescriptor.for_path(name)
    writer, _ = data.do_put(path, newer.schema, DEADLINE)
    with writer:
        writer.write_with_metadata(newer, b'{"group_rows": 2, "mode": "upsert"}')
    found = get(data, name=name)
    assert dict(zip(found["id"].to_pylist(), found["word"].to_pylist(), strict=True)) == {
        "a": "old",
        "b": "new",
        "ü": "new",
    }


def test_another_type_of_ids_is_refused(data, name):
    put(data, name, batch(pa.array([1, 2])))
    for ids in TYPES_OF_TEXTS.values():
        with pytest.raises(flight.FlightError, match=r"`id` is .*string, dataset .* has int64"):
            put(data, name, batch(ids))
    with pytest.raises(flight.FlightError, match="`id` is double, expected utf8 or an integer"):
        put(data, name, batch(pa.array([1.0, 2.0])))
    assert get(data, name=name)["id"].to_pylist() == [1, 2]


@pytest.mark.parametrize(
    ("field", "operator", "value", "right"),
    [
        ("n", "<", "3", [1, 2]),
        ("n", "=", "2.0", [2]),
        ("n", ">=", 3, [3]),
        ("f", ">", "0.9", [2, 3]),
        ("flag", "=", "true", [1, 3]),
        ("flag", "!=", "true", [2]),
        ("word", "=", 7, [3]),
        ("word", "=", "7", [3]),
        ("id", "==", "2", [2]),
        ("timestamp", ">", "1970-01-01T00:00:00.000000001", [3]),
    ],
)
def test_values_of_filters_may_be_text(data, meta, name, field, operator, value, right):
    word = pa.array(["a", "b", "7"], pa.large_utf8())
    flag = pa.array([True, False, True])
    n = pa.array([1, 2, 3])
    put(data, name, batch(n, n=n, f=pa.array([0.5, 1, 1.5]), flag=flag, word=word))
    filters = [{"field": field, "op": operator, "value": value}]
    for client in (data, meta):
        assert get(client, name=name, filters=filters)["n"].to_pylist() == right
        search = {"dataset": name, "vector": [1.0] * DIMS, "k": 5, "filters": filters}
        assert sorted(get(client, search=search)["id"].to_pylist()) == right


@pytest.mark.parametrize("value", ["abc", "", "true", [], None])
def test_values_that_fit_no_number_are_refused(data, name, value):
    put(data, name, batch(pa.array([1, 2]), n=pa.array([1, 2])))
    filters = [{"field": "n", "op": "<", "value": value}]
    with pytest.raises(flight.FlightError, match="a filter compares `n`, which is int64, with"):
        get(data, name=name, filters=filters)
