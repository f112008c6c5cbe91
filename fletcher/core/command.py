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

from fletcher.core.chunking import METHODS, Chunking
from fletcher.errors import InvalidCommandError, UnknownFieldError

DATASET_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
MAX_NAME_LENGTH = 128
MAX_PROMPT_CHARACTERS = 4096
MAX_COLUMNS = 1024
MAX_NUMBER = 1_000_000

CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("float32", "float16", "int8", "ubinary"),
    "output": ("dense", "sparse", "multi"),
    "truncate": ("end", "start", "error"),
    "on_error": ("continue", "abort"),
    "mode": ("append", "upsert", "overwrite", "delta"),
    "dedupe": ("off", "text", "id"),
    "durability": ("journal", "store", "memory"),
    "priority": ("bulk", "interactive"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedCommand:
    """One embedding request's options; field names are those on the wire (docs/wire.md, Commands).

    Attributes:
        dataset: Where vectors go; required for DoPut, refused nowhere. `[A-Za-z0-9][A-Za-z0-9_-]*`,
            at most 128 characters.
        upload_id: Names the upload so that it can be resumed; the server makes one up if absent.
        model: A model's name; None: the server's default.
        text_column: Input column that holds the text.
        id_column: Input column that holds the id; used if present.
        prompt: A prompt's name in the bundle (`query`, ...), or literal text put before each text:
            anything that is no single word.
        dims: Leading dimensions to keep (Matryoshka), re-normalised; None: all.
        layers: Exit layer; None: all layers.
        dtype: Element type of `vector`; None: the server's choice (float16; float32 for
            stores that take nothing else).
        normalize: L2-normalise; None: as the model says.
        truncate: What to do with texts over the model's length.
        chunking: How long texts are cut into chunks, and what becomes of their vectors:
            `METHOD[:SIZE[/OVERLAP]][:AGGREGATION][:late]` (see `core.chunking`), or `none`.
            With the aggregation `none` each chunk is a row.
        columns: Input columns to carry through to the output.
        include_text: Carry the text itself; None: true for stores, false for DoExchange.
        on_error: `continue` reports a failed row and goes on; `abort` ends the call with its error.
        mode: `append`, `upsert` (replace by id), `overwrite` (replace the dataset) or `delta`
            (upsert, without the rows whose id is stored with the same text).
        dedupe: `id` or `text` drops rows whose id or text came earlier or is stored; `off` keeps
            them all. Goes with the modes `append` and `overwrite`.
        durability: When a row is acknowledged and counts as durable: `journal` (it is on the
            server's disk, on its way), `store` (the store has it), `memory` (as received, never
            durable); None: `journal` where the server has one, else `store`.
        priority: `interactive` goes before `bulk`; None: small exchanges are interactive.
        store: A store's name from the server's configuration; None: its default.
        continuous: Rows of one id, one after the other, are pieces of one document, whose chunks
            come back as they are complete; goes with `chunking` of the aggregation `none`, in
            DoExchange.
        output: What the model has to give, else it is refused: `dense`, a vector a text; `sparse`,
            weights of some tokens of the vocabulary; `multi`, a vector a token; None: whatever it
            gives.
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
    chunking: str | None = None
    columns: tuple[str, ...] = ()
    include_text: bool | None = None
    on_error: str = "continue"
    mode: str = "append"
    dedupe: str = "off"
    durability: str | None = None
    priority: str | None = None
    store: str | None = None
    continuous: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        columns: Any = self.columns
        if isinstance(columns, list):
            object.__setattr__(self, "columns", tuple(columns))
        for spec in dataclasses.fields(self):
            _check_type(spec, getattr(self, spec.name))
        if self.dataset is not None:
            check_dataset(self.dataset)
        for name in CHOICES:
            _check_choice(name, getattr(self, name))
        for name in ("upload_id", "model", "text_column", "id_column", "store"):
            value = getattr(self, name)
            if value is not None:
                _check_name(name, value)
        if self.upload_id is not None and not DATASET_PATTERN.fullmatch(self.upload_id):
            raise InvalidCommandError(
                f"`upload_id` is {self.upload_id!r}, expected letters, digits, `_` and `-`, "
                "starting with a letter or digit",
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
            if value is not None and not 1 <= value <= MAX_NUMBER:
                raise InvalidCommandError(
                    f"`{name}` is {_shown(value)}, expected 1 to {MAX_NUMBER}", field=name
                )
        _check_columns(self.columns)
        self._check_chunking()
        self._check_duplicates()

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> EmbedCommand:
        """Options from decoded JSON or TOML.

        Raises:
            UnknownFieldError: A name that is no option.
            InvalidCommandError: A value of the wrong type or out of range.
        """
        for name in fields:
            if name not in FIELD_NAMES:
                raise UnknownFieldError(
                    f"`{_shortened(name)}` is not a field of EmbedCommand",
                    field=_shortened(name),
                    allowed=FIELD_NAMES,
                )
        return cls(**fields)

    def _check_chunking(self) -> None:
        chunking = Chunking.parse(self.chunking or "none")
        if self.continuous and (chunking is None or not chunking.rows):
            raise InvalidCommandError(
                f"`continuous` is true and `chunking` is {self.chunking or 'none'}, but a document "
                "that comes in pieces leaves as rows, one a chunk; end `chunking` with :none",
                field="continuous",
                allowed=[f"chunking {method}[:SIZE[/OVERLAP]]:none" for method in METHODS],
            )
        if chunking is None:
            return
        if chunking.rows and (self.dedupe != "off" or self.mode in ("upsert", "delta")):
            field = "mode" if self.dedupe == "off" else "dedupe"
            raise InvalidCommandError(
                f"`{field}` is {getattr(self, field)}, which takes rows of one id or text for one, "
                f"and `chunking` is {self.chunking}, which gives a text several rows of its id; "
                "leave one of them out",
                field=field,
                allowed=["append", "overwrite"] if field == "mode" else ["off"],
            )
        if self.truncate != "end":
            raise InvalidCommandError(
                f"`truncate` is {self.truncate} and `chunking` is {self.chunking}, which cuts "
                "nothing off; leave one of them out",
                field="truncate",
                allowed=["end"],
            )

    def _check_duplicates(self) -> None:
        if self.dedupe != "off" and self.mode not in ("append", "overwrite"):
            raise InvalidCommandError(
                f"`dedupe` is {self.dedupe} and `mode` is {self.mode}, which replaces rows by id; "
                "leave one of them out",
                field="dedupe",
                allowed=["off"],
            )
        if self.include_text is False and (self.dedupe == "text" or self.mode == "delta"):
            asked = "`dedupe` is text" if self.dedupe == "text" else "`mode` is delta"
            raise InvalidCommandError(
                f"`include_text` is false, but {asked}, which compares stored texts; store them",
                field="include_text",
                allowed=["true"],
            )

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


FIELD_NAMES = tuple(spec.name for spec in dataclasses.fields(EmbedCommand))

_TYPES: dict[str, type] = {
    "dims": int,
    "layers": int,
    "normalize": bool,
    "include_text": bool,
    "continuous": bool,
    "columns": tuple,
}


def _check_type(spec: dataclasses.Field[Any], value: Any) -> None:
    if value is None and spec.default is None:
        return
    expected = _TYPES.get(spec.name, str)
    # A bool is an int to isinstance, and must not pass as `dims`.
    good = type(value) is expected
    if expected is tuple:
        good = good and all(isinstance(item, str) for item in value)
    if not good:
        words = {
            str: "a string",
            int: "an integer",
            bool: "true or false",
            tuple: "a list of names",
        }
        raise InvalidCommandError(
            f"`{spec.name}` is {_shown(value)}, expected {words[expected]}", field=spec.name
        )
    for text in value if expected is tuple else [value] if expected is str else []:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidCommandError(
                f"`{spec.name}` holds half a surrogate pair, expected Unicode text",
                field=spec.name,
            )


def _check_choice(name: str, value: str | None) -> None:
    allowed = CHOICES[name]
    if value is None or value in allowed:
        return
    raise InvalidCommandError(
        f"`{name}` is {_shown(value)}, expected one of {', '.join(allowed)}",
        field=name,
        allowed=allowed,
    )


def _check_name(field: str, value: str) -> None:
    if not 1 <= len(value) <= MAX_NAME_LENGTH:
        raise InvalidCommandError(
            f"`{field}` has {len(value)} characters, expected 1 to {MAX_NAME_LENGTH}", field=field
        )


def _check_columns(columns: tuple[str, ...]) -> None:
    if len(columns) > MAX_COLUMNS:
        raise InvalidCommandError(
            f"`columns` names {len(columns)} columns, at most {MAX_COLUMNS}", field="columns"
        )
    for name in columns:
        _check_name("columns", name)
    if len(set(columns)) != len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise InvalidCommandError(f"`columns` names `{twice}` twice", field="columns")


def _shown(value: Any) -> str:
    """A value for a message: short, whatever came."""
    if type(value) is int and value.bit_length() > 64:
        return "a number of more than 64 bits"
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    shown = text if len(text) <= 200 else text[:200] + "..."
    return shown.encode("utf-8", "backslashreplace").decode()
