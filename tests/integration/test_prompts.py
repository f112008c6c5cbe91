"""Prompts by name and literal, as commands give them and as `fletcher ingest` chooses them."""

from __future__ import annotations

import numpy as np
import pytest

import fletcher
from fletcher.client.prompts import DOCUMENT_PROMPTS, QUERY_PROMPTS, default_prompt, served_model
from fletcher.errors import InvalidCommandError, ModelMismatchError


def test_a_name_stands_for_its_text(client: fletcher.Client) -> None:
    literal = client.embed(["text of all: go"])
    assert np.array_equal(client.embed(["go"], prompt="text of all: "), literal)
    named = client.embed(["go"], prompt="query")
    assert np.array_equal(named, client.embed(["search the text: go"]))
    assert not np.array_equal(named, client.embed(["go"], prompt=""))


def test_an_unknown_name_is_refused_with_those_there_are(client: fletcher.Client) -> None:
    for name in ("querry", "search_document", "s2p.v-1", "é"):
        with pytest.raises(InvalidCommandError, match="expected a prompt of") as caught:
            client.embed(["go"], prompt=name)
        assert (caught.value.field, caught.value.allowed) == ("prompt", ["query"])
    for literal in ("querry:", "two words", " ", "?"):
        assert client.embed(["go"], prompt=literal).shape == (1, 32)


def test_a_prompt_must_leave_room_for_a_text(client: fletcher.Client) -> None:
    # 32 tokens, of which 2 are special; a digit is a token of its own.
    assert client.embed(["go"], prompt="1 " * 29).shape == (1, 32)
    for length in (30, 500):
        with pytest.raises(InvalidCommandError, match="takes all 32 tokens") as caught:
            client.embed(["go"], prompt="1 " * length)
        assert caught.value.field == "prompt"


def test_a_command_takes_the_prompt_for_its_purpose(client: fletcher.Client) -> None:
    model = served_model(client, None)
    assert default_prompt(model, QUERY_PROMPTS) == "query"
    assert default_prompt(model, DOCUMENT_PROMPTS) is None
    nomic = {"prompts": {"search_query": "", "search_document": ""}}
    assert default_prompt(nomic, DOCUMENT_PROMPTS) == "search_document"
    assert served_model(client, f"{model['name']}@{model['hash']}") == model
    with pytest.raises(ModelMismatchError):
        served_model(client, "other")
