"""JSON of actions: bodies without unknown fields, and answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from fletcher.errors import InvalidCommandError, UnknownFieldError

MAX_BODY_BYTES = 1 << 20

_Request = TypeVar("_Request", bound=msgspec.Struct)
_Name = Annotated[str, Meta(min_length=1)]

# msgspec's messages for a value of the wrong type and for a missing field.
_WRONG = re.compile(r"^(?P<wrong>.*) - at `\$\.(?P<field>\w+).*`$", re.DOTALL)
_TYPE = re.compile(r"`(\w+)(?: \| null)?`")
_TYPES = {
    "bool": "true or false",
    "str": "a string",
    "int": "an integer",
    "float": "a number with a fraction",
    "array": "a list",
    "object": "an object",
}
_MISSING = re.compile(r"^Object missing required field `(?P<field>\w+)`")


class ModelRequest(msgspec.Struct):
    """Body of `load_model` and `swap_model`; `model` may be `name@hash`."""

    model: _Name


class UnloadRequest(msgspec.Struct):
    """Body of `unload_model`; `force` ends the model's calls."""

    model: _Name
    force: bool = False


class AliasRequest(msgspec.Struct):
    """Body of `set_alias`; `models` is MODEL:WEIGHT,... or empty to remove the alias."""

    alias: _Name
    models: str | None = None


class ListModelsRequest(msgspec.Struct):
    """Body of `list_models`."""

    format: Literal["json", "protobuf"] = "json"


def to_json(answer: Mapping[str, Any]) -> bytes:
    """Encode an action's answer.

    Python's json module takes ten times as long for numbers: 0.4 ms for one vector.
    """
    return msgspec.json.encode(answer, enc_hook=float)


def decode_request(kind: type[_Request], body: bytes) -> _Request:
    """Decode an action's JSON body.

    Raises:
        UnknownFieldError: The body has a field that the action does not know.
        InvalidCommandError: The body is not a JSON object, or a value has the wrong type.
    """
    return convert_request(kind, parse_json(body))


def convert_request(kind: type[_Request], fields: dict[str, Any]) -> _Request:
    """Convert a decoded JSON object to a request. Raises as `decode_request`."""
    known = kind.__struct_fields__
    for name in fields:
        if name not in known:
            raise UnknownFieldError(
                f"`{name[:200]}` is not a field of this action, expected {', '.join(known)}",
                field=name[:200],
                allowed=known,
            )
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise field_error(str(error)) from None


def field_error(text: str) -> InvalidCommandError:
    """Error for a field, made from the text of a `msgspec.ValidationError`."""
    if found := _MISSING.match(text):
        return InvalidCommandError(f"`{found['field']}` is missing", field=found["field"])
    if found := _WRONG.match(text):
        wrong = _TYPE.sub(lambda one: _TYPES.get(one[1], one[1]), found["wrong"])
        wrong = wrong[0].lower() + wrong[1:]
        return InvalidCommandError(f"`{found['field']}`: {wrong}", field=found["field"])
    return InvalidCommandError(text)


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a command or body: a JSON object in UTF-8 without repeated fields.

    The json module parses, because msgspec would accept a repeated field and take its last value.

    Raises:
        InvalidCommandError: The body is not such an object; the message says why.
    """
    check_size(body)
    try:
        value = json.loads(
            body.decode(), object_pairs_hook=_unique_fields, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise InvalidCommandError(
            f"the command is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}"
        ) from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at character {error.pos}"
        raise InvalidCommandError(f"the command is not JSON: {where}") from None
    except (RecursionError, ValueError):  # nested too deep; a number of thousands of digits
        raise InvalidCommandError(
            "the command is JSON nested too deep, or holds a number too long"
        ) from None
    if not isinstance(value, dict):
        raise InvalidCommandError("the command is not a JSON object, expected `{...}`")
    return value


def check_size(body: bytes) -> None:
    """Refuse a command or body of more than MAX_BODY_BYTES."""
    if len(body) > MAX_BODY_BYTES:
        raise InvalidCommandError(f"the command has {len(body)} bytes, at most {MAX_BODY_BYTES}")


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            field = name[:200]
            raise InvalidCommandError(f"`{field}` is given twice; give it once", field=field)
        fields[name] = value
    return fields


def _no_constant(name: str) -> Any:
    raise InvalidCommandError(f"the command is not JSON: {name} is not a JSON number")
