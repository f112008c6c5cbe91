"""Owners of uploads."""

from __future__ import annotations

import pytest

from fletcher.core.command import EmbedCommand
from fletcher.core.owner import certificate_owner, owned_id, plain_id, token_owner
from fletcher.core.schema import batch_key, parse_batch_key
from fletcher.errors import InvalidCommandError


def test_no_two_callers_have_the_same_id() -> None:
    owners = ["", token_owner(b"a"), token_owner(b"b"), certificate_owner(b"a")]
    ids = [owned_id("nightly", owner) for owner in owners]
    assert len(set(ids)) == 4
    assert {plain_id(one) for one in ids} == {"nightly"}
    assert ids[0] == "nightly"  # as in journals and stores of earlier releases
    for one in ids:
        assert parse_batch_key(batch_key(one, 3, 9)) == (one, 3, 9)


def test_a_client_cannot_name_another_owner() -> None:
    owned = EmbedCommand(dataset="d", upload_id="u").owned_by(token_owner(b"a"))
    assert owned.upload_id is not None
    with pytest.raises(InvalidCommandError):
        EmbedCommand(dataset="d", upload_id=owned.upload_id)


def test_an_upload_without_an_id_belongs_to_its_caller_too() -> None:
    owner = token_owner(b"a")
    named = EmbedCommand(dataset="d").owned_by(owner).upload_id
    assert named is not None
    assert named.endswith(f".{owner}")
    assert EmbedCommand(dataset="d").owned_by("").upload_id is None


def test_keys_fit_a_file_name() -> None:
    key = batch_key(owned_id("u" * 128, token_owner(b"a")), 10**18, 10**18 + 1)
    assert len(key) < 200
