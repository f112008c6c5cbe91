"""What a client may ask of one upload or exchange: the fields of `EmbedCommand`, typed and checked.

The client library and the server share this class, so a bad value is refused before it travels
and once more on arrival.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fletcher.errors import InvalidCommandError, UnknownFieldError

DATASET_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
MAX_NAME_LENGTH = 128
MAX_PROMPT_CHARACTERS = 4096

CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("float32", "float16"),
    "truncate": ("end", "start", "error"),
    "on_error": ("continue", "abort"),
    "mode": ("append", "upsert", "overwrite"),
    "dedupe": ("off",),
    "durability": ("store", "memory"),
    "priority": ("bulk", "interactive"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions:
    """One embedding request's options; field names are those on the wire (contract.md, Commands).

    Attributes:
        dataset: Where vectors go; required for DoPut, refused nowhere. `[A-Za-z0-9][A-Za-z0-9_-]*`,
            at most 128 characters.
        upload_id: Names the upload so that it can be resumed; the server makes one up if absent.
        model: A model's name; None: the server's default.
        text_column: Input column that holds the text.
        id_column: Input column that holds the id; used if present.
        prompt: A prompt's name in the bundle (`query`, ...) or literal text put before each text.
        dims: Leading dimensions to keep (Matryoshka), re-normalised; None: all.
        layers: Exit layer; None: all layers.
        dtype: Element type of `vector`; None: the server's choice (float16; float32 for
            stores that take nothing else).
        normalize: L2-normalise; None: as the model says.
        truncate: What to do with texts over the model's length.
        columns: Input columns to carry through to the output.
        include_text: Carry the text itself; None: true for stores, false for DoExchange.
        on_error: `continue` reports a failed row and goes on; `abort` ends the call with its error.
        mode: `append`, `upsert` (replace by id) or `overwrite` (replace the dataset).
        dedupe: Content deduplication.
        durability: When a row counts as durable: `store` (the store has it), `memory` (never).
        priority: `interactive` goes before `bulk`; None: small exchanges are interactive.
        store: A store's name from the server's configuration; None: its default.
    """

    dataset: str | None = None
    upload_id: str | None = None
    model: str | None = None
    text_column: str = "text"
    id_column: str = "id"
    prompt: str | None = None
    dims: int | None = None
    layers: int | None = None
    dtype: str | None = None
    normalize: bool | None = None
    truncate: str = "end"
    columns: tuple[str, ...] = ()
    include_text: bool | None = None
    on_error: str = "continue"
    mode: str = "append"
    dedupe: str = "off"
    durability: str = "store"
    priority: str | None = None
    store: str | None = None

    def __post_init__(self) -> None:
        if self.dataset is not None:
            check_dataset(self.dataset)
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise InvalidCommandError(
                    f"`{name}` is {value!r}, expected one of {', '.join(allowed)}",
                    field=name,
                    allowed=allowed,
                )
        for name in ("upload_id", "model", "text_column", "id_column", "store"):
            value = getattr(self, name)
            if value is not None and not 1 <= len(value) <= MAX_NAME_LENGTH:
                raise InvalidCommandError(
                    f"`{name}` has {len(value)} characters, expected 1 to {MAX_NAME_LENGTH}",
                    field=name,
                )
        if self.upload_id is not None and not DATASET_PATTERN.fullmatch(self.upload_id):
            raise InvalidCommandError(
                f"`upload_id` is {self.upload_id!r}, expected letters, digits, `_` and `-`",
                field="upload_id",
                allowed=[DATASET_PATTERN.pattern],
            )
        if self.prompt is not None and len(self.prompt) > MAX_PROMPT_CHARACTERS:
            raise InvalidCommandError(
                f"`prompt` has {len(self.prompt)} characters, at most {MAX_PROMPT_CHARACTERS}",
                field="prompt",
            )
        for name in ("dims", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidCommandError(f"`{name}` is {value}, expected at least 1", field=name)
        if len(set(self.columns)) != len(self.columns):
            raise InvalidCommandError("`columns` names a column twice", field="columns")

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> EmbedOptions:
        """Options from decoded JSON or TOML.

        Raises:
            UnknownFieldError: A name that is no option.
            InvalidCommandError: A value of the wrong type or out of range.
        """
        for name in fields:
            if name not in _TYPES:
                raise UnknownFieldError(
                    f"`{name}` is not a field of EmbedCommand", field=name, allowed=sorted(_TYPES)
                )
        return cls(**{name: _typed(name, value) for name, value in fields.items()})

    def to_mapping(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON-ready values."""
        out = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value != spec.default:
                out[spec.name] = list(value) if isinstance(value, tuple) else value
        return out

    def to_json(self) -> bytes:
        """The command as JSON, ready for `FlightDescriptor.for_command`."""
        return json.dumps(self.to_mapping(), ensure_ascii=False).encode()


def check_dataset(name: str) -> None:
    """Refuses a dataset name that is not `[A-Za-z0-9][A-Za-z0-9_-]{0,127}`."""
    if not DATASET_PATTERN.fullmatch(name):
        raise InvalidCommandError(
            f"`dataset` is {name[:200]!r}, expected letters, digits, `_` and `-`, at most 128, "
            "starting with a letter or digit",
            field="dataset",
            allowed=[DATASET_PATTERN.pattern],
        )


_TYPES: dict[str, type] = {
    spec.name: {
        "dims": int,
        "layers": int,
        "normalize": bool,
        "include_text": bool,
        "columns": tuple,
    }.get(spec.name, str)
    for spec in dataclasses.fields(EmbedOptions)
}


def _typed(name: str, value: Any) -> Any:
    expected = _TYPES[name]
    if value is None:
        return None if name not in ("text_column", "id_column", "columns") else _refuse(name, value)
    if expected is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        _refuse(name, value)
    if type(value) is not expected:
        _refuse(name, value)
    return value


def _refuse(name: str, value: Any) -> Any:
    expected = {str: "a string", int: "an integer", bool: "true or false", tuple: "a list of names"}
    raise InvalidCommandError(
        f"`{name}` is {json.dumps(value, default=repr)[:200]}, expected {expected[_TYPES[name]]}",
        field=name,
    )
