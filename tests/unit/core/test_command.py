import dataclasses
import json

import pytest

from fletcher.core.command import CHOICES, FIELD_NAMES, EmbedCommand
from fletcher.errors import InvalidCommandError, UnknownFieldError

FULL = {
    "dataset": "d",
    "upload_id": "u-1",
    "model": "m",
    "text_column": "body",
    "id_column": "package",
    "prompt": "query: ",
    "dims": 64,
    "layers": 3,
    "dtype": "float16",
    "normalize": False,
    "truncate": "error",
    "chunking": "none",
    "columns": ["a", "b"],
    "include_text": False,
    "on_error": "abort",
    "mode": "upsert",
    "dedupe": "off",
    "durability": "memory",
    "priority": "interactive",
    "store": "s",
    "output": "dense",
    "continuous": False,
    "answer_bytes": 0,
    "accept_compression": ["zstd"],
}


def test_every_field_is_exercised():
    assert set(FULL) == set(FIELD_NAMES)


def test_a_mapping_goes_there_and_back():
    options = EmbedCommand.from_mapping(FULL)
    again = EmbedCommand.from_mapping(json.loads(options.to_json()))
    assert again == options
    assert options.columns == ("a", "b")
    assert options.to_mapping() == {
        k: v for k, v in FULL.items() if k not in ("dedupe", "continuous")
    }
    assert EmbedCommand().to_mapping() == {}


def test_an_unknown_field_is_named_with_those_there_are():
    with pytest.raises(UnknownFieldError) as caught:
        EmbedCommand.from_mapping({"dataset": "d", "dim": 3})
    assert caught.value.field == "dim"
    assert "dims" in caught.value.allowed


@pytest.mark.parametrize("name", ["", "-a", "_a", "a/b", "a b", "ä", "a" * 129, "../x", "a\n"])
@pytest.mark.parametrize("field", ["dataset", "upload_id"])
def test_names_with_anything_else_in_them_are_refused(field, name):
    with pytest.raises(InvalidCommandError) as caught:
        EmbedCommand(**{field: name})
    assert caught.value.field == field


@pytest.mark.parametrize("field", CHOICES)
def test_a_wrong_choice_is_answered_with_the_right_ones(field):
    with pytest.raises(InvalidCommandError) as caught:
        EmbedCommand(**{field: "nonsense"})
    assert caught.value.field == field
    assert caught.value.allowed == list(CHOICES[field])
    for choice in CHOICES[field]:
        assert getattr(EmbedCommand(**{field: choice}), field) == choice


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("dims", True, "an integer"),
        ("dims", "3", "an integer"),
        ("dims", 3.0, "an integer"),
        ("dims", 0, "1 to"),
        ("dims", -1, "1 to"),
        ("dims", 1 << 40, "1 to"),
        pytest.param("dims", 1 << 20000, "64 bits", id="huge"),
        ("layers", 0, "1 to"),
        ("normalize", 1, "true or false"),
        ("columns", "text", "a list of names"),
        ("columns", [1], "a list of names"),
        ("columns", ["a", "b" * 129], "129 characters"),
        ("columns", ["\ud800"], "surrogate"),
        ("chunking", 3, "a string"),
        ("dtype", "\ud800", "surrogate"),
        ("continuous", None, "true or false"),
        ("columns", ["a", "b", "a"], "`a` twice"),
        ("columns", [""], "0 characters"),
        ("columns", [str(n) for n in range(1025)], "at most 1024"),
        ("text_column", None, "a string"),
        ("truncate", None, "one of end, start, error"),
        ("mode", None, "one of append, upsert"),
        ("model", {}, "a string"),
        ("model", "", "0 characters"),
        ("model", "m" * 129, "129 characters"),
        ("model", "\ud800", "surrogate"),
        ("prompt", "p" * 4097, "4097 characters"),
    ],
)
def test_a_wrong_value_is_named(field, value, said):
    with pytest.raises(InvalidCommandError, match=said) as caught:
        EmbedCommand.from_mapping({field: value})
    assert caught.value.field == field
    assert len(caught.value.message) < 400
    caught.value.to_json()  # whatever came, it can be sent


def test_null_means_absent_where_absence_means_something():
    nullable = {s.name: None for s in dataclasses.fields(EmbedCommand) if s.default is None}
    assert EmbedCommand.from_mapping(nullable) == EmbedCommand()
