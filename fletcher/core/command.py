"""Options of one upload or exchange, with types, limits and choices checked.

The client library and the server share this class: the client refuses a bad value before sending
it, and the server checks what it receives. msgspec checks types, limits and choices, which are
declared as annotations of the fields.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import typing
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, inspect

from fletcher.core.chunking import METHODS, Chunking
from fletcher.core.owner import owned_id
from fletcher.errors import InvalidCommandError, UnknownFieldError

DATASET_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
MAX_NUMBER = 1_000_000

_SURROGATE = re.compile("[\ud800-\udfff]")
# End of msgspec's message about a wrong list item; the number is the item's index.
_ITEM = re.compile(r"`\$\[(\d+)\]`$")

Identifier = Annotated[str, Meta(pattern=rf"^{DATASET_PATTERN.pattern}\Z")]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
Prompt = Annotated[str, Meta(max_length=4096)]
Number = Annotated[int, Meta(ge=1, le=MAX_NUMBER)]
Columns = Annotated[tuple[Name, ...], Meta(max_length=1024)]
AnswerBytes = Annotated[int, Meta(ge=0, le=1 << 30)]
Codecs = Annotated[tuple[Literal["lz4", "zstd"], ...], Meta(max_length=2)]

# Most bytes of one message of an answer, unless the client asks for more. Clients in Go, Rust and
# JavaScript refuse more than 4 MiB by default.
MAX_ANSWER_BYTES = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedCommand:
    """Options of one embedding request, named as on the wire (docs/wire.md, Commands).

    Attributes:
        dataset: Dataset that receives the vectors; required for DoPut. Form of the name:
            `[A-Za-z0-9][A-Za-z0-9_-]*`, at most 128 characters.
        upload_id: Name under which the upload can be resumed; None: the server makes one up.
        model: A model's name; None: the server's default.
        text_column: Input column with the text.
        id_column: Input column with the id. The column may be missing.
        prompt: What is put before each text. A single word is the name of a prompt in the bundle,
            such as `query`. Anything else is literal text.
        dims: Number of leading dimensions to keep (Matryoshka); the shortened vectors are
            normalised again. None: all dimensions.
        layers: Layer from which vectors are taken (an exit of the model); None: the last layer.
        dtype: Element type of `vector`; None: the server's choice (float16, or float32 for stores
            that take nothing else).
        normalize: Whether to L2-normalise vectors; None: as the model does.
        truncate: For a text longer than the model reads: cut off its `end` or its `start`, or fail
            the row (`error`).
        chunking: How long texts are cut into chunks and how the chunks' vectors are combined:
            `METHOD[:SIZE[/OVERLAP]][:AGGREGATION][:late]` (see `core.chunking`), or `none`. With
            the aggregation `none` each chunk is a row.
        columns: Input columns to copy to the output.
        include_text: Whether to copy the text to the output; None: true for stores, false for
            DoExchange.
        on_error: `continue` reports a failed row and processes the others; `abort` ends the call
            with the row's error.
        mode: `append`, `upsert` (replace by id), `overwrite` (replace the dataset) or `delta`
            (like `upsert`, but rows are dropped if their id is stored with the same text and the
            same carried columns). An overwrite takes effect once all its rows are stored.
        dedupe: `id` or `text` drops rows whose id or text was sent earlier or is stored; `off`
            keeps all rows. Only for the modes `append` and `overwrite`.
        durability: When a row is acknowledged as durable: `journal` (on the server's disk), `store`
            (in the store), `memory` (on receipt, never durable). None: `journal` if the server has
            a journal, else `store`.
        priority: `interactive` calls are served before `bulk` calls. None: small exchanges are
            interactive, other calls bulk.
        store: A store's name in the server's configuration; None: the default store.
        continuous: Whether successive rows with the same id are parts of one document. Each chunk
            is sent back once it is complete. Only for DoExchange, with the aggregation `none` in
            `chunking`.
        output: The only output of a model to accept: `dense`, one vector per text; `sparse`,
            weights of vocabulary tokens; `multi`, one vector per token. None: accept any.
        answer_bytes: Largest message of an answer, in bytes. A batch with a larger answer is
            answered by several messages. 0: one message for each batch. Only for DoExchange.
        accept_compression: Codecs (`lz4`, `zstd`) that the client can read. The server may compress
            answers with one of them. Only for DoExchange.
    """

    dataset: Identifier | None = None
    upload_id: Identifier | None = None
    model: Name | None = None
    text_column: Name = "text"
    id_column: Name = "id"
    prompt: Prompt | None = None
    dims: Number | None = None
    layers: Number | None = None
    dtype: Literal["float32", "float16", "int8", "ubinary"] | None = None
    normalize: bool | None = None
    truncate: Literal["end", "start", "error"] = "end"
    chunking: str | None = None
    columns: Columns = ()
    include_text: bool | None = None
    on_error: Literal["continue", "abort"] = "continue"
    mode: Literal["append", "upsert", "overwrite", "delta"] = "append"
    dedupe: Literal["off", "text", "id"] = "off"
    durability: Literal["journal", "store", "memory"] | None = None
    priority: Literal["bulk", "interactive"] | None = None
    store: Name | None = None
    continuous: bool = False
    output: Literal["dense", "sparse", "multi"] | None = None
    answer_bytes: AnswerBytes = MAX_ANSWER_BYTES
    accept_compression: Codecs = ()

    def __post_init__(self) -> None:
        for name, default in _DEFAULTS:
            value = getattr(self, name)
            if value is not default:
                object.__setattr__(self, name, _checked(name, value))
        if len(set(self.columns)) != len(self.columns):
            twice = next(name for name in self.columns if self.columns.count(name) > 1)
            raise InvalidCommandError(f"`columns` names `{twice}` twice", field="columns")
        self._check_chunking()
        self._check_duplicates()

    def owned_by(self, owner: str) -> EmbedCommand:
        """This command with the id that an owner's upload has in journal and stores.

        An empty `owner` is anonymous, and changes nothing.
        """
        if not owner:
            return self
        owned = copy.copy(self)
        upload_id = owned_id(self.upload_id or uuid.uuid4().hex, owner)
        object.__setattr__(owned, "upload_id", upload_id)  # no client can send such an id
        return owned

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> EmbedCommand:
        """The command that decoded JSON or TOML describes.

        Raises:
            UnknownFieldError: A name is not an option.
            InvalidCommandError: A value has the wrong type or is out of range.
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
        chunking = Chunking.from_text(self.chunking or "none")
        if self.continuous and (chunking is None or not chunking.rows):
            raise InvalidCommandError(
                f"`continuous` is true, but `chunking` is {self.chunking or 'none'}, expected one "
                "that gives each chunk a row; end `chunking` with :none",
                field="continuous",
                allowed=[f"chunking {method}[:SIZE[/OVERLAP]]:none" for method in METHODS],
            )
        if chunking is None:
            return
        if chunking.rows and (self.dedupe != "off" or self.mode == "delta"):
            field = "mode" if self.dedupe == "off" else "dedupe"
            raise InvalidCommandError(
                f"`{field}` is {getattr(self, field)}, which expects one row per id and text, but "
                f"`chunking` is {self.chunking}, which makes several; omit one of them",
                field=field,
                allowed=["append", "upsert", "overwrite"] if field == "mode" else ["off"],
            )
        if self.truncate != "end":
            raise InvalidCommandError(
                f"`truncate` is {self.truncate}, but `chunking` is {self.chunking}, which cuts off "
                "nothing; omit one of them",
                field="truncate",
                allowed=["end"],
            )

    def _check_duplicates(self) -> None:
        if self.dedupe != "off" and self.mode not in ("append", "overwrite"):
            raise InvalidCommandError(
                f"`dedupe` is {self.dedupe}, but `mode` is {self.mode}, which replaces rows by id; "
                "omit one of them",
                field="dedupe",
                allowed=["off"],
            )
        if self.include_text is False and (self.dedupe == "text" or self.mode == "delta"):
            asked = "`dedupe` is text" if self.dedupe == "text" else "`mode` is delta"
            raise InvalidCommandError(
                f"`include_text` is false, but {asked}, which compares stored texts; omit it",
                field="include_text",
                allowed=["true"],
            )

    def to_mapping(self) -> dict[str, Any]:
        """Fields that differ from their defaults, in types that JSON has."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, default in _DEFAULTS
            if (value := getattr(self, name)) != default
        }

    def to_json(self) -> bytes:
        """The command as JSON, for `FlightDescriptor.for_command`."""
        return json.dumps(self.to_mapping(), ensure_ascii=False).encode()


_DEFAULTS = tuple((spec.name, spec.default) for spec in dataclasses.fields(EmbedCommand))
FIELD_NAMES = tuple(name for name, _ in _DEFAULTS)
_TYPES = typing.get_type_hints(EmbedCommand, include_extras=True)


def _described(name: str) -> inspect.Type:
    """The type of a field that is set, so without None."""
    found = inspect.type_info(_TYPES[name])
    return found.types[0] if isinstance(found, inspect.UnionType) else found


_DESCRIBED = {name: _described(name) for name in FIELD_NAMES}
# The allowed values of fields, in the order of their declaration, which msgspec does not keep.
CHOICES: dict[str, tuple[str, ...]] = {
    name: typing.get_args(part)
    for name, kind in _TYPES.items()
    for part in (kind, *typing.get_args(kind))
    if typing.get_origin(part) is Literal
}


def check_dataset(name: str) -> None:
    """Refuse a dataset name that is not `[A-Za-z0-9][A-Za-z0-9_-]{0,127}`."""
    if _checked("dataset", name) is None:
        raise _refusal("dataset", name, _DESCRIBED["dataset"])


def _checked(name: str, value: Any) -> Any:
    """Check a field's value and convert it to the field's type, such as list to tuple."""
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, str) and not text.isascii() and _SURROGATE.search(text):
            raise InvalidCommandError(
                f"`{name}` holds half a surrogate pair, expected Unicode text", field=name
            )
    try:
        return msgspec.convert(value, _TYPES[name])
    except msgspec.ValidationError as error:
        place = _ITEM.search(str(error))
        kind = _DESCRIBED[name]
        if isinstance(kind, inspect.VarTupleType) and place is not None:
            item = value[int(place[1])]
            if isinstance(item, str):
                value, kind = item, kind.item_type
        raise _refusal(name, value, kind) from None


def _refusal(name: str, value: Any, kind: inspect.Type) -> InvalidCommandError:
    got = f"is {_shown(value)}"
    allowed: Sequence[str] | None = None
    if isinstance(kind, inspect.LiteralType):
        allowed = CHOICES[name]
        expected = f"one of {', '.join(allowed)}"
    elif isinstance(kind, inspect.IntType):
        expected = f"an integer from {kind.ge} to {kind.le}"
    elif isinstance(kind, inspect.BoolType):
        expected = "true or false"
    elif isinstance(kind, inspect.VarTupleType):
        of = f"of {', '.join(CHOICES[name])}" if name in CHOICES else "of names"
        expected = f"a list {of}, at most {kind.max_length}"
        if isinstance(value, (list, tuple)) and len(value) > (kind.max_length or 0):
            got = f"has {len(value)} names"
    elif isinstance(kind, inspect.StrType) and kind.pattern:
        expected = "letters, digits, `_` and `-`, at most 128, starting with a letter or digit"
        allowed = [DATASET_PATTERN.pattern]
    elif isinstance(kind, inspect.StrType) and kind.max_length:
        expected = f"a string of {kind.min_length or 0} to {kind.max_length} characters"
        if isinstance(value, str):
            got = f"has {len(value)} characters"
    else:
        expected = "a string"
    return InvalidCommandError(f"`{name}` {got}, expected {expected}", field=name, allowed=allowed)


def _shown(value: Any) -> str:
    """A value as an error message shows it, shortened."""
    if type(value) is int and value.bit_length() > 64:
        return "a number of more than 64 bits"
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    shown = text if len(text) <= 200 else text[:200] + "..."
    return shown.encode("utf-8", "backslashreplace").decode()
