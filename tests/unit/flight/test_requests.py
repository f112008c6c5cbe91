"""Bodies of actions and metadata of batches: types, unknown fields, and what refusals name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fletcher.errors import FletcherError, InvalidCommandError, UnknownFieldError
from fletcher.flight.reading import MAX_METADATA_BYTES, BatchMetadata, parse_batch_metadata
from fletcher.flight.requests import (
    AliasRequest,
    ModelRequest,
    UnloadRequest,
    decode_request,
)


@pytest.mark.parametrize(
    ("body", "request_"),
    [
        (b'{"model": "a@1"}', ModelRequest("a@1")),
        (b'{"model": "a"}', UnloadRequest("a")),
        (b'{"model": "a", "force": true}', UnloadRequest("a", force=True)),
        (b'{"alias": "x"}', AliasRequest("x")),
        (b'{"alias": "x", "models": null}', AliasRequest("x")),
        (b'{"alias": "x", "models": "a:1,b:2"}', AliasRequest("x", "a:1,b:2")),
    ],
)
def test_bodies_become_requests(body: bytes, request_: Any) -> None:
    assert decode_request(type(request_), body) == request_


@pytest.mark.parametrize(
    ("kind", "body", "error", "field"),
    [
        (ModelRequest, b"{}", InvalidCommandError, "model"),
        (ModelRequest, b'{"model": ""}', InvalidCommandError, "model"),
        (ModelRequest, b'{"model": 1}', InvalidCommandError, "model"),
        (ModelRequest, b'{"model": "a", "force": true}', UnknownFieldError, "force"),
        (ModelRequest, b'{"model": "a", "\\ud800": 1}', UnknownFieldError, "\\ud800"),
        (ModelRequest, b'{"model": "a", "model": "b"}', InvalidCommandError, "model"),
        (ModelRequest, b"[]", InvalidCommandError, None),
        (ModelRequest, b"", InvalidCommandError, None),
        (UnloadRequest, b'{"model": "a", "force": 1}', InvalidCommandError, "force"),
        (UnloadRequest, b'{"model": "a", "force": null}', InvalidCommandError, "force"),
        (AliasRequest, b'{"alias": "x", "models": ["a"]}', InvalidCommandError, "models"),
    ],
)
def test_other_bodies_are_refused_by_field(
    kind: type[msgspec.Struct], body: bytes, error: type[FletcherError], field: str | None
) -> None:
    with pytest.raises(error) as caught:
        decode_request(kind, body)
    assert caught.value.field == field
    if error is UnknownFieldError:
        assert caught.value.allowed == list(kind.__struct_fields__)
    if field is not None:
        assert f"`{field}`" in caught.value.message
    caught.value.to_json()


def test_a_refusal_says_what_was_expected_and_what_came() -> None:
    with pytest.raises(InvalidCommandError) as caught:
        decode_request(UnloadRequest, b'{"model": "a", "force": 1}')
    assert caught.value.message == "`force`: expected true or false, got an integer"
    with pytest.raises(InvalidCommandError) as caught:
        parse_batch_metadata(b'{"batch_id": "1"}')
    assert caught.value.message == "`batch_id`: expected an integer, got a string"


@pytest.mark.parametrize(
    ("raw", "metadata"),
    [
        (None, BatchMetadata()),
        (b"", BatchMetadata()),
        (b"{}", BatchMetadata()),
        (b'{"batch_id": 7, "row_offset": null}', BatchMetadata(batch_id=7)),
        (b'{"end": true, "rows": 0}', BatchMetadata(end=True, rows=0)),
        (b'{"document_end": true}', BatchMetadata(document_end=True)),
    ],
)
def test_metadata_of_a_batch(raw: bytes | None, metadata: BatchMetadata) -> None:
    assert parse_batch_metadata(raw) == metadata


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b"[]", "app_metadata"),
        (b"nothing", "app_metadata"),
        (b"\xff", "app_metadata"),
        (b'{"row": 1}', "app_metadata"),
        (b"{" + b" " * MAX_METADATA_BYTES + b"}", "app_metadata"),
        (b"[" * 50_000, "app_metadata"),
        (b'{"batch_id": -1}', "batch_id"),
        (b'{"batch_id": true}', "batch_id"),
        (b'{"row_offset": 1.0}', "row_offset"),
        (b'{"row_offset": "1"}', "row_offset"),
        (b'{"row_offset": 9007199254740992}', "row_offset"),
        (b'{"end": null}', "end"),
        (b'{"document_end": 1}', "document_end"),
        (b'{"end": true}', "rows"),
    ],
)
def test_other_metadata_is_refused_by_field(raw: bytes, field: str) -> None:
    with pytest.raises(InvalidCommandError) as caught:
        parse_batch_metadata(raw)
    assert caught.value.field == field
    caught.value.to_json()
