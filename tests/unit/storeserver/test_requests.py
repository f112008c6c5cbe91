"""Request bodies of the store server: what is accepted, and what an error says."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fletcher.errors import InvalidCommandError
from fletcher.stores.base import Combination, Comparison, Negation
from fletcher.stores.protocol import GroupHeader, MissingKeysRequest
from fletcher.storeserver.requests import (
    MAX_FILTER_DEPTH,
    DeleteRequest,
    DoGetRequest,
    FilterRequest,
    HybridSearchRequest,
    SearchRequest,
    convert_request,
    decode_request,
    to_filters,
)


def search(**fields: Any) -> SearchRequest:
    body = json.dumps({"dataset": "d", "vector": [1, 2], **fields}).encode()
    return decode_request(SearchRequest, body, "the body")


def test_an_empty_body_is_an_empty_object_and_unknown_fields_mean_nothing() -> None:
    assert decode_request(GroupHeader, b"", "the body") == GroupHeader()
    assert search(ef=50, padding="x").k == 10
    assert decode_request(HybridSearchRequest, b'{"dataset": "d"}', "it").alpha == 0.5


@pytest.mark.parametrize(
    ("fields", "message", "field"),
    [
        ({"k": 0}, "`k` is 0 in the body: expected `int` >= 1", "k"),
        ({"k": "3"}, '`k` is "3" in the body: expected `int`, got `str`', "k"),
        ({"k": True}, "`k` is true in the body: expected `int`", "k"),
        ({"alpha": 2}, "`alpha` is 2 in the body", "alpha"),
        ({"vector": "abc"}, '`vector` is "abc" in the body', "vector"),
        ({"vector": [1, "x"]}, '`vector` is "x" in the body, at vector[1]: expected', "vector"),
        ({"columns": "id"}, '`columns` is "id" in the body', "columns"),
        ({"filters": {"a": 1}}, '`filters` is {"a": 1} in the body', "filters"),
        ({"filters": [{"field": 1}]}, "`field` is 1 in the body, at filters[0].field", "field"),
        ({"filters": [{}] * 1001}, "`filters` is [{}, {}, ", "filters"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(
    fields: dict[str, Any], message: str, field: str
) -> None:
    with pytest.raises(InvalidCommandError) as caught:
        search(**fields)
    assert caught.value.field == field
    assert caught.value.message.startswith(message)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidCommandError, match="`batch_keys` is missing in the body") as caught:
        decode_request(MissingKeysRequest, b'{"dataset": "d"}', "the body")
    assert caught.value.field == "batch_keys"
    with pytest.raises(InvalidCommandError, match="`id` is missing"):
        decode_request(DeleteRequest, b'{"dataset": "d"}', "the body")
    with pytest.raises(InvalidCommandError, match="`vector` is not a list of numbers"):
        assert search(vector=None).query_vectors


@pytest.mark.parametrize(
    "body", [b"\xff", b"[1]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b'{"k": 1e999}']
)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidCommandError):
        decode_request(SearchRequest, body, "the body")


def test_a_converted_request_is_checked_as_well() -> None:
    fields = {"dataset": "d", "vector": [1.0], "k": 0}
    with pytest.raises(InvalidCommandError, match="`k` is 0 in a row"):
        convert_request(SearchRequest, fields, "a row")


@pytest.mark.parametrize("mode", ["replace", "x - at `$.y`", 3])
def test_an_unknown_mode_is_refused_with_the_known_ones(mode: object) -> None:
    with pytest.raises(InvalidCommandError, match=r"`mode` is .* append, upsert") as caught:
        convert_request(GroupHeader, {"mode": mode}, "the header")
    assert caught.value.allowed == ["append", "upsert"]


def test_several_vectors_make_a_matrix_and_ragged_ones_none() -> None:
    vectors = search(vectors=[[1, 2], [3, 4]]).query_vectors
    np.testing.assert_array_equal(vectors, np.array([[1, 2], [3, 4]], np.float32))
    with pytest.raises(InvalidCommandError, match="all of one length"):
        assert search(vectors=[[1], [1, 2]]).query_vectors
    with pytest.raises(InvalidCommandError, match="`token_vectors` a list"):
        assert search(token_vectors=[[1], [1, 2]]).query_vectors
    (query,) = search(vector=[9], token_vectors=[[1, 2], [3, 4]]).query_vectors
    np.testing.assert_array_equal(query, np.array([[1, 2], [3, 4]], np.float32))


def test_a_ticket_is_a_name_or_an_object() -> None:
    assert DoGetRequest.from_ticket(b" d \n").dataset == "d"
    assert DoGetRequest.from_ticket(b'{"name": "d", "limit": 3}').limit == 3
    assert DoGetRequest.from_ticket(b'{"dataset": "d"}').dataset == "d"
    outer = {"name": "d", "filters": [{"field": "id", "value": "x"}], "search": {"vector": [1]}}
    ticket = DoGetRequest.from_ticket(json.dumps(outer).encode())
    assert ticket.search is not None
    assert ticket.search.dataset == "d"
    assert to_filters(ticket.search.filters, None) == (Comparison("id", "=", "x"),)
    inner = {**outer, "search": {"dataset": "e", "vector": [1], "filters": []}}
    ticket = DoGetRequest.from_ticket(json.dumps(inner).encode())
    assert ticket.search is not None
    assert (ticket.dataset, ticket.search.filters) == ("e", [])


@pytest.mark.parametrize("ticket", [b"", b"\xff\x00{{", b"[1]", b'{"filters": []}', b"../etc"])
def test_a_ticket_without_a_dataset_is_refused(ticket: bytes) -> None:
    with pytest.raises(InvalidCommandError):
        DoGetRequest.from_ticket(ticket)


def test_filters_take_longbows_spellings() -> None:
    requests = [
        FilterRequest("a", op="EQ", value=1),
        FilterRequest("b", operator=">=", op="eq", value=2, logic="OR"),
        FilterRequest(filters=[FilterRequest("c", value=None)]),
    ]
    either = Combination("or", (Comparison("a", "=", 1), Comparison("b", ">=", 2)))
    assert to_filters(requests, None) == (Combination("and", (either, Comparison("c", "=", None))),)


@pytest.mark.parametrize(
    ("kind", "value", "right"),
    [
        (pa.bool_(), "true", True),
        (pa.bool_(), "false", False),
        (pa.bool_(), ["true", False], [True, False]),
        (pa.utf8(), 5, "5"),
        (pa.large_utf8(), [5, "x"], ["5", "x"]),
        (pa.utf8(), "true", "true"),
        # These are left to the store, which reads numbers and times from text, or refuses them.
        (pa.bool_(), "yes", "yes"),
        (pa.bool_(), 1, 1),
        (pa.utf8(), 1.5, 1.5),
        (pa.utf8(), True, True),
        (pa.int64(), "5", "5"),
        (pa.int64(), 5, 5),
    ],
)
def test_values_are_typed_by_the_column(kind: pa.DataType, value: Any, right: Any) -> None:
    schema = pa.schema([("a", kind)])
    nested = FilterRequest(operator="not", filters=[FilterRequest("a", op="in", value=value)])
    for requests, found in (
        ([FilterRequest("a", value=value)], Comparison("a", "=", right)),
        ([nested], Negation(Comparison("a", "in", right))),
    ):
        (one,) = to_filters(requests, schema)
        assert one == found
        assert repr(one) == repr(found), "1 equals True"


def test_filters_take_our_operators_too() -> None:
    requests = [
        FilterRequest(operator="not", filters=[FilterRequest("a", operator="in", value=[1, 2])]),
        FilterRequest("b", operator="IS NULL"),
        FilterRequest("c", value=1),
    ]
    negated = Negation(Comparison("a", "in", [1, 2]))
    both = (negated, Comparison("b", "is null"), Comparison("c", "=", 1))
    assert to_filters(requests, None) == (Combination("and", both),)
    with pytest.raises(InvalidCommandError, match="not in a filter on `a`"):
        to_filters([FilterRequest("a", operator="not", value=1)], None)


def test_alternating_logic_is_bounded() -> None:
    one = [FilterRequest("a", value=1, logic=("and", "or")[place % 2]) for place in range(1000)]
    with pytest.raises(InvalidCommandError, match="nested"):
        to_filters(one, None)
    assert to_filters([FilterRequest("a", value=1, logic="or")] * 1000, None)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (FilterRequest("a", operator="like"), "operator"),
        (FilterRequest("a", logic="xor"), "logic"),
        (FilterRequest(value=1), "filters"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(request_: FilterRequest, field: str) -> None:
    with pytest.raises(InvalidCommandError) as caught:
        to_filters([request_], None)
    assert caught.value.field == field


def test_filters_are_nested_to_a_bound() -> None:
    nested = FilterRequest("a", value=1)
    for _ in range(MAX_FILTER_DEPTH):
        nested = FilterRequest(filters=[nested])
    assert to_filters([nested], None)
    with pytest.raises(InvalidCommandError, match="nested"):
        to_filters([FilterRequest(filters=[nested])], None)
