"""Commands as Flight carries them: a descriptor's path, JSON, or protobuf.

A command is JSON if its first byte is `{`, else protobuf (proto/fletcher/v1/embed.proto).
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from google.protobuf import unknown_fields
from google.protobuf.message import DecodeError, Message

from fletcher.core.command import FIELD_NAMES, EmbedCommand
from fletcher.errors import InvalidCommandError, UnknownFieldError
from fletcher.flight.requests import (
    MAX_BODY_BYTES,
    ListModelsRequest,
    convert_request,
    decode_request,
    parse_json,
    too_large,
)
from fletcher.v1 import embed_pb2

# Flight.proto's DescriptorType, which pyarrow's enumeration repeats.
_PATH, _CMD = 1, 2

_Kind = TypeVar("_Kind", bound=Message)


class Descriptor(Protocol):
    """The part of pyarrow.flight.FlightDescriptor that is read here."""

    @property
    def descriptor_type(self) -> Any: ...
    @property
    def path(self) -> Any: ...
    @property
    def command(self) -> Any: ...


def parse_descriptor(descriptor: Descriptor) -> EmbedCommand:
    """Parse a PATH `[dataset]` or a CMD `EmbedCommand`.

    Raises:
        UnknownFieldError: EmbedCommand has no such field.
        InvalidCommandError: The command is wrong in another way.
    """
    kind = getattr(descriptor.descriptor_type, "value", descriptor.descriptor_type)
    if kind == _CMD:
        return parse_command(descriptor.command)
    if kind != _PATH:
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
    """Parse an EmbedCommand, JSON or binary. Raises as `parse_descriptor`."""
    if _is_json(command):
        return EmbedCommand.from_mapping(parse_json(command))
    return EmbedCommand.from_mapping(_fields_of(embed_pb2.EmbedCommand(), command))


def parse_list_models(body: bytes) -> ListModelsRequest:
    """Parse the body of `list_models`. Raises as `parse_descriptor`."""
    if _is_json(body):
        return decode_request(ListModelsRequest, body)
    fields = _fields_of(embed_pb2.ListModelsCommand(), body)
    return convert_request(ListModelsRequest, fields)


def _is_json(body: bytes) -> bool:
    return body[:1] == b"{"


def _fields_of(message: Message, body: bytes) -> dict[str, Any]:
    """The fields that a binary message sets.

    Raises:
        UnknownFieldError, InvalidCommandError: The bytes are not such a message.
    """
    return {
        spec.name: list(value) if spec.is_repeated else value
        for spec, value in _decode(message, body).ListFields()
    }


def _decode(message: _Kind, body: bytes) -> _Kind:
    if len(body) > MAX_BODY_BYTES:
        raise too_large(len(body))
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
    """Refuse fields that the schema lacks, in nested messages, too."""
    unknown = unknown_fields.UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        raise UnknownFieldError(
            f"field number {number} is not a field of {message.DESCRIPTOR.name}, or has another "
            "type there",
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
