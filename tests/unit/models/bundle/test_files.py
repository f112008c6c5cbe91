"""Errors of JSON files name the file, the field, the expected and the actual value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest

from fletcher.errors import ModelError
from fletcher.models.bundle.files import convert_json


class Row(msgspec.Struct, forbid_unknown_fields=True):
    dims: int


class Example(msgspec.Struct, forbid_unknown_fields=True):
    count: Annotated[int, msgspec.Meta(ge=1)] = 1
    shown: str = msgspec.field(name="hidden", default="")
    kind: Literal["one", "two"] = "one"
    kinds: tuple[Literal["one", "two"], ...] = ()
    texts: dict[str, str] = {}
    rows: list[Row] = []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "x.json: expected `object`, got `array`; retry"),
        ({"other": 1}, "x.json has an unknown field `other`; retry"),
        ({"count": "1"}, "x.json: `count` is '1', expected `int`; retry"),
        ({"count": True}, "x.json: `count` is True, expected `int`; retry"),
        ({"count": 0}, "x.json: `count` is 0, expected `int` >= 1; retry"),
        ({"hidden": 1}, "x.json: `hidden` is 1, expected `str`; retry"),
        ({"kind": "three"}, "x.json: `kind` is 'three', expected one of one, two; retry"),
        ({"kinds": ["one", "no"]}, "x.json: `kinds[1]` is 'no', expected one of one, two; retry"),
        (
            {"texts": {"a": 1}},
            "x.json: `texts[...]` has a value of type `int`, expected `str`; retry",
        ),
        ({"rows": [{"dims": "2"}]}, "x.json: `rows[0].dims` is '2', expected `int`; retry"),
        ({"rows": [{"dims": 1}, {}]}, "x.json has no field `dims` in `rows[1]`; retry"),
    ],
)
def test_what_is_wrong_is_named(value: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        convert_json(value, Example, "x.json", "; retry")
    assert caught.value.message == message
    if "`kind" in message:
        assert caught.value.allowed == ["one", "two"]


def test_what_is_right_is_converted() -> None:
    example = convert_json({"count": 2, "kinds": ["two"]}, Example, "x.json")
    assert (example.count, example.kinds) == (2, ("two",))
