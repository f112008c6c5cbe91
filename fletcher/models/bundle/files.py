"""Helpers for a bundle's files: JSON, checksums and safe names."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from fletcher.errors import ModelError

_Type = TypeVar("_Type")

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# A model's name, or `name@hash`, the name of one version.
VERSION_NAME = re.compile(rf"({MODEL_NAME.pattern})(?:@([0-9a-f]{{12}}))?")


def check_name(name: str) -> str:
    """Return a model name if it can name a folder: `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.

    Raises:
        ModelError: The name does not match this pattern.
    """
    if not MODEL_NAME.fullmatch(name):
        raise ModelError(
            f"`name` is {name[:200]!r}, expected letters, digits, `.`, `_` and `-`, at most 128, "
            "starting with a letter or digit; choose one with --name",
            field="name",
            allowed=[MODEL_NAME.pattern],
        )
    return name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ModelError: The file is missing, or holds no JSON object.
    """
    try:
        # msgspec's reader would refuse NaN and Infinity, which some checkpoints contain.
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError):
        raise ModelError(f"{path.name} is not readable JSON") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} holds no JSON object")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """Like `read_json`, but returns an empty dict if the file is missing."""
    return read_json(path) if path.is_file() else {}


@contextlib.contextmanager
def damage_named(place: str) -> Iterator[None]:
    """Turn errors of reading nested JSON into a ModelError that names the file.

    Use it where a value can be of any type and shape, and checks of each would hide the meaning.
    """
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelError(
            f"{place} is damaged ({type(error).__name__}: {str(error)[:200]}); get it again"
        ) from error


def invalid_value(
    place: str, key: str, value: Any, expected: str, allowed: Sequence[str] | None = None
) -> ModelError:
    """Error for an invalid value under `key` in the file `place`."""
    text = f"{place}: `{key}` is {repr(value)[:200]}, expected {expected}"
    return ModelError(text, field=key, allowed=allowed)


def invalid_choice(
    place: str, key: str, value: Any, allowed: Iterable[str], remedy: str = ""
) -> ModelError:
    """Error for a value under `key` in the file `place` that is not in `allowed`."""
    names = list(allowed)
    return invalid_value(place, key, value, f"one of {', '.join(names)}{remedy}", names)


def convert_json(value: Any, kind: type[_Type], place: str, remedy: str = "") -> _Type:
    """Convert a decoded JSON value to a type, usually a struct.

    `place` is the file's name. An error message begins with `place` and ends with `remedy`.

    Raises:
        ModelError: A field is unknown or missing, or its value has the wrong type or range.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), value, kind, place, remedy) from None


def _refusal(text: str, value: Any, kind: Any, place: str, remedy: str) -> ModelError:
    """ModelError from msgspec's message `text`, with the invalid and allowed values."""
    reason, _, path = text.partition(" - at `$")
    path = path.strip(".`")
    if named := re.fullmatch(r"Object (missing required|contains unknown) field `(.+)`", reason):
        state = "no" if named[1].startswith("missing") else "an unknown"
        inside = f" in `{path}`" if path else ""
        return ModelError(f"{place} has {state} field `{named[2]}`{inside}{remedy}", field=named[2])
    if not path:
        return ModelError(f"{place}: {reason[0].lower()}{reason[1:]}{remedy}")
    steps = re.findall(r"([^.\[\]]+)", path)
    allowed = _choices(kind, steps[0]) if reason.startswith("Invalid enum value") else None
    expected, _, got = reason.removeprefix("Expected ").partition(", got ")
    if allowed:
        expected = f"one of {', '.join(allowed)}"
    if "..." in path:  # msgspec does not name the key
        given = f"has a value of type {got}"
    else:
        for step in steps:
            value = value[int(step) if isinstance(value, list) else step]
        given = f"is {repr(value)[:200]}"
    return ModelError(
        f"{place}: `{path}` {given}, expected {expected}{remedy}", field=steps[0], allowed=allowed
    )


def _choices(kind: Any, field: str) -> list[str]:
    """Allowed values of a struct's field, or of the items of that field."""
    fields = {one.encode_name: one.type for one in msgspec.structs.fields(kind)}
    choice = fields[field]
    while get_origin(choice) is not Literal:
        choice = get_args(choice)[0]
    return [str(one) for one in get_args(choice)]


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_inside(name: str) -> bool:
    """Whether the relative path `name`, with separator `/`, stays inside its folder."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
