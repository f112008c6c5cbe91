"""What a Flight descriptor or an action's body asks for, as checked options; and the way back.

A command is JSON when its first byte is `{`, protobuf (proto/fletcher/v1/embed.proto) otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from google.protobuf import unknown_fields
from google.protobuf.message import DecodeError, Message

from fletcher.core.command import FIELD_NAMES, EmbedCommand
from fletcher.errors import InvalidCommandError, UnknownFieldError
from fletcher.v1 import embed_pb2

MAX_COMMAND_BYTES = 1 << 20
# Flight.proto's DescriptorType, which pyarrow's enumeration repeats.
PATH, CMD = 1, 2

Kind = TypeVar("Kind", bound=Message)


class Descriptor(Protocol):
    """The part of pyarrow.flight.FlightDescriptor that is read here."""

    @property
    def descriptor_type(self) -> Any: ...
    @property
    def path(self) -> Any: ...
    @property
    def command(self) -> Any: ...


class ListedModel(Protocol):
    """The part of a model bundle that clients are told."""

    @property
    def name(self) -> str: ...
    @property
    def hash(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def pooling(self) -> str: ...
    @property
    def normalize(self) -> bool: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def dims(self) -> Sequence[int]: ...
    @property
    def prompts(self) -> Mapping[str, str]: ...
    @property
    def output(self) -> str: ...


def parse_descriptor(descriptor: Descriptor) -> EmbedCommand:
    """The options that a PATH `[dataset]` or a CMD `EmbedCommand` asks for.

    Raises:
        UnknownFieldError: The command has a field that EmbedCommand has not.
        InvalidCommandError: Anything else that is wrong with it.
    """
    kind = getattr(descriptor.descriptor_type, "value", descriptor.descriptor_type)
    if kind == CMD:
        return parse_command(descriptor.command)
    if kind != PATH:
        raise InvalidCommandError(
            "the descriptor is neither a path nor a command", allowed=["PATH", "CMD"]
        )
    path = descriptor.path or []
    if len(path) != 1:
        raise InvalidCommandError(
            f"the descriptor's path has {len(path)} parts, expected one: the dataset",
            field="dataset",
        )
    try:
        dataset = path[0].decode()
    except UnicodeDecodeError:
        raise InvalidCommandError("`dataset` is not UTF-8", field="dataset") from None
    return EmbedCommand(dataset=dataset)


def parse_command(command: bytes) -> EmbedCommand:
    """The options of an EmbedCommand, JSON or binary. Raises as `parse_descriptor` does."""
    if _is_json(command):
        return EmbedCommand.from_mapping(parse_json(command))
    message = _decode(embed_pb2.EmbedCommand(), command)
    fields = {
        spec.name: list(value) if spec.is_repeated else value
        for spec, value in message.ListFields()
    }
    return EmbedCommand.from_mapping(fields)


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object as a command or an action's body must be: UTF-8, each field once.

    Raises:
        InvalidCommandError: The bytes are not such an object; the message says where.
    """
    if len(body) > MAX_COMMAND_BYTES:
        raise _too_large(len(body))
    try:
        value = json.loads(
            body.decode(), object_pairs_hook=_unique_fields, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise InvalidCommandError(
            f"the command is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}"
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidCommandError(
            f"the command is not JSON: {error.msg} at character {error.pos}"
        ) from None
    except (RecursionError, ValueError):  # nested too deep; a number of thousands of digits
        raise InvalidCommandError(
            "the command is JSON nested too deep, or holds a number too long"
        ) from None
    if not isinstance(value, dict):
        raise InvalidCommandError("the command is not a JSON object, expected `{...}`")
    return value


def parse_list_models(body: bytes) -> str:
    """The format that a `list_models` body asks for: `json` (also where empty) or `protobuf`.

    Raises:
        UnknownFieldError, InvalidCommandError: As for commands.
    """
    if not body:
        return "json"
    if _is_json(body):
        fields = parse_json(body)
        for name in fields:
            if name != "format":
                raise UnknownFieldError(
                    f"`{name[:200]}` is not a field of ListModelsCommand",
                    field=name[:200],
                    allowed=["format"],
                )
        format_name = fields.get("format", "json")
    else:
        format_name = _decode(embed_pb2.ListModelsCommand(), body).format or "json"
    if format_name not in ("json", "protobuf"):
        raise InvalidCommandError(
            f"`format` is {str(format_name)[:200]!r}, expected json or protobuf",
            field="format",
            allowed=["json", "protobuf"],
        )
    return str(format_name)


def encode_models(
    models: Sequence[tuple[ListedModel, Mapping[str, Any]]],
    aliases: Mapping[str, str],
    *,
    format_name: str = "json",
) -> bytes:
    """The answer of `list_models`.

    Args:
        models: Bundles that are served, each with `is_default`, `state`, `is_current`, `calls` and
            `memory_bytes` among what is known of it.
        aliases: What each stands for.
        format_name: `json`: `{"models": [{...ModelInfo}], "aliases": {...}}`; `protobuf`: a
            ListModelsResult.
    """
    infos = [_model_info(model) | {name: run[name] for name in _RUNNING} for model, run in models]
    if format_name == "protobuf":
        result = embed_pb2.ListModelsResult(
            models=[embed_pb2.ModelInfo(**info) for info in infos], aliases=aliases
        )
        return bytes(result.SerializeToString())
    return json.dumps({"models": infos, "aliases": dict(aliases)}, ensure_ascii=False).encode()


_RUNNING = ("is_default", "state", "is_current", "calls", "memory_bytes")


def _model_info(model: ListedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "hash": model.hash,
        "family": model.family,
        "dim": model.dim,
        "max_length": model.max_length,
        "pooling": model.pooling,
        "normalize": model.normalize,
        "num_layers": model.num_layers,
        "layers": list(model.layers),
        "dims": list(model.dims),
        "prompts": dict(model.prompts),
        "output": model.output,
    }


def _is_json(body: bytes) -> bool:
    return body[:1] == b"{"


def _too_large(size: int) -> InvalidCommandError:
    return InvalidCommandError(f"the command has {size} bytes, at most {MAX_COMMAND_BYTES}")


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise InvalidCommandError(f"`{name[:200]}` comes twice", field=name[:200])
        fields[name] = value
    return fields


def _no_constant(name: str) -> Any:
    raise InvalidCommandError(f"the command is not JSON: {name} is no JSON number")


def _decode(message: Kind, body: bytes) -> Kind:
    if len(body) > MAX_COMMAND_BYTES:
        raise _too_large(len(body))
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise InvalidCommandError(
            f"the command is neither JSON (it does not start with `{{`) nor a binary "
            f"{message.DESCRIPTOR.name}"
        ) from None
    _refuse_unknown(message)
    return message


def _refuse_unknown(message: Message) -> None:
    """Refuses fields that the schema has not, in messages within messages as well."""
    unknown = unknown_fields.UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        raise UnknownFieldError(
            f"field number {number} is not a field of {message.DESCRIPTOR.name}, or not of the "
            "type that it has there",
            field=str(number),
            allowed=FIELD_NAMES if isinstance(message, embed_pb2.EmbedCommand) else None,
        )
    for spec, value in message.ListFields():
        if spec.message_type is None:
            continue
        if spec.message_type.GetOptions().map_entry:
            inner = [item for item in value.values() if isinstance(item, Message)]
        else:
            inner = list(value) if spec.is_repeated else [value]
        for item in inner:
            _refuse_unknown(item)
