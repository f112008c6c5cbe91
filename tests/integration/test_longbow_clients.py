"""Clients of Longbow at `fletcher store`: what they send, and what they get."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.net import flight_errors
from fletcher.storeserver.namespaces import Namespaces
from fletcher.storeserver.requests import EmptyRequest, NamespaceRequest
from tests.integration import store_calls
from tests.integration.store_calls import DEADLINE, put

DIMS = 4


def batch(ids, **more):
    vectors = np.random.default_rng(len(ids)).standard_normal((len(ids), DIMS), np.float32)
    own = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIMS)
    times = pa.array(range(len(ids)), pa.timestamp("ns"))
    return pa.record_batch({"id": ids, "vector": own, "timestamp": times, **more})


def get(client, **ticket) -> pa.Table:
    return store_calls.get(client, ticket)


def act(client, action, body=None):
    (result,) = store_calls.act(client, action, body)
    return result


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


def path(name):
    return flight.FlightDescriptor.for_path(name)


def exchange(client, descriptor):
    writer, reader = client.do_exchange(descriptor, DEADLINE)
    with writer:
        writer.begin(batch(TEXTS).schema)
        writer.done_writing()
        reader.read_chunk()


NOT_FOUND = {
    "DoGet": lambda data, meta, name: get(data, name="nope"),
    "DoGet on the meta port": lambda data, meta, name: get(meta, name="nope"),
    "filtered DoGet": lambda data, meta, name: get(
        data, name="nope", filters=[{"field": "id", "value": 1}]
    ),
    "search": lambda data, meta, name: get(data, search={"dataset": "nope", "vector": [1], "k": 1}),
    "VectorSearch": lambda data, meta, name: act(
        data, "VectorSearch", {"dataset": "nope", "vector": [1], "k": 1}
    ),
    "VectorSearchByID": lambda data, meta, name: act(
        data, "VectorSearchByID", {"dataset": "nope", "id": "1", "k": 1}
    ),
    "unknown id": lambda data, meta, name: act(
        data, "VectorSearchByID", {"dataset": name, "id": "nope", "k": 1}
    ),
    "delete": lambda data, meta, name: act(data, "delete", {"dataset": "nope", "id": "1"}),
    "delete of an unknown id": lambda data, meta, name: act(
        data, "delete", {"dataset": name, "id": "nope"}
    ),
    "delete-dataset": lambda data, meta, name: act(data, "delete-dataset", {"dataset": "nope"}),
    "DeleteNamespace": lambda data, meta, name: act(data, "DeleteNamespace", {"dataset": "nope"}),
    "DeleteNamespace of a name": lambda data, meta, name: act(
        meta, "DeleteNamespace", {"name": "nope"}
    ),
    "GetFlightInfo": lambda data, meta, name: meta.get_flight_info(path("nope"), DEADLINE),
    "GetSchema": lambda data, meta, name: meta.get_schema(path("nope"), DEADLINE),
}
UNIMPLEMENTED = {
    "ListFlights": lambda data, meta, name: list(data.list_flights(options=DEADLINE)),
    "GetFlightInfo": lambda data, meta, name: data.get_flight_info(path(name), DEADLINE),
    "DoPut": lambda data, meta, name: put(meta, name, batch(TEXTS)),
    "DoExchange": lambda data, meta, name: exchange(
        meta, flight.FlightDescriptor.for_path("ingest", name)
    ),
    "CreateNamespace": lambda data, meta, name: act(data, "CreateNamespace", {"name": "x"}),
    "an action": lambda data, meta, name: act(data, "ForceSnapshot"),
    "an action on the meta port": lambda data, meta, name: act(meta, "ForceSnapshot"),
}
INVALID_ARGUMENT = {
    "no path": lambda data, meta, name: data.do_put(
        flight.FlightDescriptor.for_command(b"x"), batch(TEXTS).schema, DEADLINE
    )[0].close(),
    "exchange": lambda data, meta, name: exchange(data, path("x")),
    "body": lambda data, meta, name: act(data, "delete-dataset", b"{"),
    "no dataset": lambda data, meta, name: act(data, "delete-dataset"),
    "nothing to delete": lambda data, meta, name: act(data, "DeleteNamespace"),
    "two things to delete": lambda data, meta, name: act(
        data, "DeleteNamespace", {"dataset": name, "name": name}
    ),
    "k of 0": lambda data, meta, name: act(
        data, "VectorSearch", {"dataset": name, "vector": [1] * DIMS, "k": 0}
    ),
    "width": lambda data, meta, name: get(data, search={"dataset": name, "vector": [1], "k": 1}),
    "another type": lambda data, meta, name: put(data, name, batch(pa.array([1, 2]))),
}
STATUSES = [
    *(("NOT_FOUND", what, call) for what, call in NOT_FOUND.items()),
    *(("UNIMPLEMENTED", what, call) for what, call in UNIMPLEMENTED.items()),
    *(("INVALID_ARGUMENT", what, call) for what, call in INVALID_ARGUMENT.items()),
]


@pytest.mark.parametrize(
    ("status", "what", "call"), STATUSES, ids=[f"{one[0]}-{one[1]}" for one in STATUSES]
)
def test_refusals_have_longbows_statuses_and_a_text(
    data, meta, name, monkeypatch, status, what, call
):
    sent = []
    raised = flight_errors.to_flight_error

    def to_flight_error(*args):
        sent.append(raised(*args))
        return sent[-1]

    monkeypatch.setattr(flight_errors, "to_flight_error", to_flight_error)
    put(data, name, batch(TEXTS))
    with pytest.raises((flight.FlightError, pa.ArrowException)) as caught:
        call(data, meta, name)
    kinds = {
        "NOT_FOUND": flight_errors.NotFoundError,
        "UNIMPLEMENTED": flight_errors.UnimplementedError,
        "INVALID_ARGUMENT": flight_errors.InvalidArgumentError,
    }
    assert {type(one) for one in sent} == {kinds[status]}
    said = str(caught.value)
    assert said.startswith(str(sent[0]))
    assert "Traceback" not in said
    if what != "GetSchema":
        assert json.loads(caught.value.extra_info)["message"] == str(sent[0])
    assert get(data, name=name).num_rows == len(TEXTS)


def test_get_schema_tells_the_schema(data, meta, name):
    put(data, name, batch(TEXTS))
    for client in (data, meta):
        found = client.get_schema(path(name), DEADLINE).schema
        assert found.equals(get(data, name=name).schema)


def test_namespaces(data, meta):
    listed = {"count": 1, "namespaces": ["default"]}
    assert json.loads(act(meta, "ListNamespaces")) == listed
    assert json.loads(act(meta, "CreateNamespace", {"name": "team"})) == {"status": "created"}
    assert json.loads(act(meta, "CreateNamespace", {"name": "a"})) == {"status": "created"}
    for taken in ("team", "default"):
        for more in ({}, {"overwrite": True}):
            with pytest.raises(flight.FlightError, match=f"namespace already exists: {taken}"):
                act(meta, "CreateNamespace", {"name": taken, **more})
    listed = {"count": 3, "namespaces": ["default", "a", "team"]}
    assert json.loads(act(meta, "ListNamespaces")) == listed
    assert json.loads(act(meta, "GetTotalNamespaceCount")) == {"count": 3}
    # The data port deletes them as well.
    assert json.loads(act(meta, "DeleteNamespace", {"name": "a"})) == {"status": "deleted"}
    assert json.loads(act(data, "DeleteNamespace", {"name": "team"})) == {"status": "deleted"}
    assert json.loads(act(meta, "GetTotalNamespaceCount")) == {"count": 1}
    with pytest.raises(flight.FlightError, match="`default` cannot be deleted"):
        act(meta, "DeleteNamespace", {"name": "default"})


def test_namespaces_of_earlier_releases_are_kept(tmp_path):
    file = tmp_path / "namespaces.json"
    file.write_text('["default", "team"]')
    names = Namespaces(file)
    assert json.loads(names.list_names(EmptyRequest())[0])["namespaces"] == ["default", "team"]
    names.create_name(NamespaceRequest("a"))
    assert json.loads(file.read_text()) == ["a", "team"]


@pytest.mark.parametrize("port", ["data", "meta"])
def test_delete_namespace_deletes_a_dataset(request, data, name, port):
    put(data, name, batch(TEXTS))
    client = request.getfixturevalue(port)
    assert act(client, "DeleteNamespace", {"dataset": name}) == b"deleted"
    assert json.loads(act(client, "check_readiness", {"dataset": name}))["status"] == "NOT_FOUND"


def test_readiness_has_longbows_fields(data, meta, name):
    put(data, name, batch(TEXTS))
    for client in (data, meta):
        ready = json.loads(act(client, "check_readiness", {"dataset": name}))
        assert ready == {"status": "READY", "index_len": len(TEXTS)}
        unknown = json.loads(act(client, "check_readiness", {"dataset": "nope"}))
        assert unknown == {"status": "NOT_FOUND", "reason": "dataset not found"}
        for body in ({}, {"dataset": ""}, b""):
            ready = json.loads(act(client, "check_readiness", body))
            assert ready["status"] == "READY"
            assert ready["index_len"] >= len(TEXTS)


UNIT = np.array([[1, 0, 0, 0], [0.8, 0.6, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0]], np.float32)


def unit_batch(ids, dtype=np.float32, factor=1, **more):
    vectors = pa.array((UNIT * factor).astype(dtype).reshape(-1))
    own = pa.FixedSizeListArray.from_arrays(vectors, DIMS)
    return pa.record_batch({"id": ids, "vector": own, **more})


def every_search(data, meta, request):
    """Ids and scores that each way to search finds."""
    asked = {"k": pa.array([request["k"]], pa.int32()), "query_vector": [request["vector"]]}
    asked |= {"dataset": [request["dataset"]]}
    asked |= {"score": [request["score"]]} if "score" in request else {}
    writer, reader = data.do_exchange(flight.FlightDescriptor.for_command(b"VectorSearch"))
    rows = pa.record_batch(asked)
    with writer:
        writer.begin(rows.schema)
        writer.write_batch(rows)
        writer.done_writing()
        exchanged = reader.read_all()
    tables = [
        exchanged,
        get(data, search=request),
        get(meta, search=request),
        pa.ipc.open_stream(act(data, "VectorSearch", request)).read_all(),
        pa.ipc.open_stream(act(meta, "VectorSearch", request)).read_all(),
    ]
    assert {tuple(one.column_names) for one in tables} == {("id", "score")}
    assert {str(one["score"].type) for one in tables} == {"float"}
    (kind,) = {one["id"].type for one in tables}
    hybrid = json.loads(act(data, "HybridSearch", request))
    assert {one["Distance"] for one in hybrid} == {0.0}
    found = [(one["id"].to_pylist(), one["score"].to_pylist()) for one in tables]
    found.append(([one["ID"] for one in hybrid], [one["Score"] for one in hybrid]))
    return kind, found


DISTANCES = [0, np.sqrt(0.4), np.sqrt(2), 2]


@pytest.mark.parametrize(
    ("ids", "kind", "right"),
    [
        (pa.array([7, 5, 3, 1]), pa.uint64(), [7, 5, 3, 1]),
        (pa.array([1, 2, 3, 2**64 - 1], pa.uint64()), pa.uint64(), [1, 2, 3, 2**64 - 1]),
        (pa.array([1, 2, -3, -(2**63)]), pa.uint64(), [1, 2, 2**64 - 3, 2**63]),
        (pa.array([1, 2, -3, -128], pa.int8()), pa.uint64(), [1, 2, 2**64 - 3, 2**64 - 128]),
        (pa.array([1, 2, 3, 255], pa.uint8()), pa.uint64(), [1, 2, 3, 255]),
        (pa.array(["a", "b", "c", "d"]), pa.utf8(), ["a", "b", "c", "d"]),
    ],
    ids=lambda one: str(getattr(one, "type", ""))[:20],
)
def test_longbows_clients_get_its_ids_and_scores(data, meta, name, ids, kind, right):
    put(data, name, unit_batch(ids))
    request = {"dataset": name, "vector": UNIT[0].tolist(), "k": 9}
    found_kind, found = every_search(data, meta, request)
    by_id = json.loads(act(data, "VectorSearchByID", {**request, "id": ids[0].as_py()}))
    assert found_kind == kind
    for one_ids, scores in [*found, (by_id["ids"], by_id["scores"])]:
        assert one_ids == right
        np.testing.assert_allclose(scores, 1 / (1 + np.array(DISTANCES)), rtol=1e-6)


def test_fletchers_clients_get_stored_ids_and_cosines(data, meta, name):
    put(data, name, unit_batch(pa.array([7, 5, -3, 1])))
    request = {"dataset": name, "vector": (UNIT[0] * 3).tolist(), "k": 9, "score": "cosine"}
    kind, found = every_search(data, meta, request)
    assert kind == pa.int64()
    # Earlier releases say nothing, but name columns.
    del request["score"]
    earlier = get(data, search={**request, "columns": ["id"]})
    for ids, scores in [*found, (earlier["id"].to_pylist(), earlier["score"].to_pylist())]:
        assert ids == [7, 5, -3, 1]
        np.testing.assert_allclose(scores, [1, 0.8, 0, -1], atol=1e-6)
    with pytest.raises(flight.FlightError, match=r'`score` is "dot" .*expected one of cosine'):
        act(data, "VectorSearch", {**request, "score": "dot"})


def test_longbows_clients_rank_by_distance(data, meta, name):
    # The second row has the best cosine, and is far away.
    vectors = pa.array(
        [[1.0, 0.2, 0, 0], [9, 0, 0, 0], None, [0, 0, 0, 0]], pa.list_(pa.float32(), 4)
    )
    put(data, name, pa.record_batch({"id": [0, 1, 2, 3], "vector": vectors}))
    request = {"dataset": name, "vector": [1, 0, 0, 0], "k": 9}
    for ids, scores in every_search(data, meta, request)[1]:
        assert ids == [0, 3, 1]
        np.testing.assert_allclose(scores, [1 / 1.2, 1 / 2, 1 / 9], rtol=1e-6)
    for ids, _ in every_search(data, meta, {**request, "score": "cosine"})[1]:
        assert ids == [1, 0]
    # A zero vector has distances, and no cosines.
    zero = {**request, "vector": [0, 0, 0, 0]}
    for ids, scores in every_search(data, meta, zero)[1]:
        assert ids == [3, 0, 1]
        np.testing.assert_allclose(scores[0], 1)
    with pytest.raises(flight.FlightError, match="`vector` is zero"):
        get(data, search={**zero, "score": "cosine"})


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_vectors_of_every_width_have_distances(data, meta, name, dtype):
    put(data, name, unit_batch(pa.array([1, 2, 3, 4]), dtype, factor=2))
    request = {"dataset": name, "vector": (UNIT[0] * 2).tolist(), "k": 3}
    for ids, scores in every_search(data, meta, request)[1]:
        assert ids == [1, 2, 3]
        np.testing.assert_allclose(scores, 1 / (1 + 2 * np.array(DISTANCES[:3])), rtol=1e-3)


def test_vectors_come_after_the_scores(data, name):
    put(data, name, unit_batch(pa.array([1, 2, 3, 4])))
    search = {"dataset": name, "vector": UNIT[1].tolist(), "k": 1, "include_vectors": True}
    found = get(data, search=search)
    assert found.column_names == ["id", "score", "vector"]
    np.testing.assert_allclose(found["vector"][0].as_py(), UNIT[1])


def test_words_count_beside_longbows_scores(data, name):
    words = pa.array(["red fox", "blue sea", "red sea", "fox"], pa.large_utf8())
    put(data, name, unit_batch(pa.array([1, 2, 3, 4]), text=words))
    request = {"dataset": name, "vector": UNIT[0].tolist(), "k": 4, "text_query": "sea"}
    near = 1 / (1 + np.array(DISTANCES))
    for alpha in (0.0, 0.25, 1.0):
        right = alpha * near + (1 - alpha) * np.array([0, 1, 1, 0])
        found = get(data, search={**request, "alpha": alpha})
        order = np.argsort(-right, kind="stable")
        assert found["id"].to_pylist() == [[1, 2, 3, 4][one] for one in order]
        np.testing.assert_allclose(found["score"].to_numpy(), right[order], rtol=1e-6)


def test_a_schema_without_rows_is_checked_and_stores_nothing(data, name):
    def declare(schema):
        data.do_put(path(name), schema, DEADLINE)[0].close()

    rows = batch(TEXTS, word=TEXTS)
    declare(rows.schema)
    with pytest.raises(flight.FlightError, match="there is no dataset"):
        get(data, name=name)
    put(data, name, rows)
    declare(rows.schema)
    declare(batch(TYPES_OF_TEXTS["utf8_view"], other=pa.array([1, 2, 3])).schema)
    for wrong, said in (
        (batch(pa.array([1, 2, 3])), "`id` is int64"),
        (batch(TEXTS, word=pa.array([1, 2, 3])), "`word` is int64"),
        (batch(TEXTS).drop_columns(["vector"]), "no column `vector`"),
    ):
        with pytest.raises(flight.FlightError, match=said):
            declare(wrong.schema)
    assert get(data, name=name).equals(pa.Table.from_batches([rows]))
