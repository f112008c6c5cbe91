"""Parsing of commands from Flight: a descriptor's path, JSON or protobuf.

A command is JSON if its first byte is `{`, else protobuf (proto/fletcher/v1/embed.proto).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf import unknown_fields
from google.protobuf.message import DecodeError, Message

from fletcher.core.command import FIELD_NAMES, EmbedCommand
from fletcher.errors import InvalidCommandError, UnknownFieldError
from fletcher.flight.requests import ListModelsRequest, check_size, convert_request, parse_json
from fletcher.v1 import embed_pb2

# Values of DescriptorType in Flight.proto and in pyarrow.
_PATH, _CMD = 1, 2

_DELIVERY = ("dataset", "mode", "dedupe", "durability", "store")
_INPUT = ("text_column", "id_column", "columns", "include_text", "chunking", "continuous")
_ANSWERS = ("answer_bytes", "accept_compression")
# Fields that a call has no use for. It refuses them instead of ignoring them. DoPut refuses
# `continuous` in `StoreSession`.
UNUSED_FIELDS = {
    "DoPut": _ANSWERS,
    "DoExchange": _DELIVERY,
    "embed": (*_DELIVERY, *_INPUT, *_ANSWERS),
    **dict.fromkeys(
        ("upload_status", "delete_upload"),
        tuple(name for name in FIELD_NAMES if name not in ("upload_id", "dataset", "store")),
    ),
}


def parse_descriptor(descriptor: Any) -> EmbedCommand:
    """Parse a FlightDescriptor: a PATH `[dataset]` or a CMD `EmbedCommand`.

    Raises:
        UnknownFieldError: The command has a field that EmbedCommand does not know.
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
    """Parse an EmbedCommand in JSON or protobuf. Raises as `parse_descriptor`."""
    return EmbedCommand.from_mapping(_parse_fields(embed_pb2.EmbedCommand(), command))


def refuse_unused(call: str, given: Iterable[str]) -> None:
    """Refuse fields that a call has no use for.

    Raises:
        InvalidCommandError: A given field is one of the call's UNUSED_FIELDS.
    """
    for name in given:
        if name in UNUSED_FIELDS[call]:
            storing = name in _DELIVERY and call not in ("upload_status", "delete_upload")
            why = ", which stores no rows; use DoPut, or leave it out" if storing else ""
            raise InvalidCommandError(
                f"`{name}` has no meaning in {call}{why or '; leave it out'}", field=name
            )


def parse_list_models(body: bytes) -> ListModelsRequest:
    """Parse the body of `list_models`. Raises as `parse_descriptor`."""
    return convert_request(ListModelsRequest, _parse_fields(embed_pb2.ListModelsCommand(), body))


def _parse_fields(message: Message, body: bytes) -> dict[str, Any]:
    """Fields of a JSON object, or of a protobuf message of `message`'s type."""
    if body[:1] == b"{":
        return parse_json(body)
    check_size(body)
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise InvalidCommandError(
            f"the command is neither JSON (it does not start with `{{`) nor a binary "
            f"{message.DESCRIPTOR.name}"
        ) from None
    _refuse_unknown(message)
    return {
        spec.name: list(value) if spec.is_repeated else value
        for spec, value in message.ListFields()
    }


def _refuse_unknown(message: Message) -> None:
    """Refuse fields that the schema lacks, also in nested messages."""
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
        is_map = spec.message_type.GetOptions().map_entry
        for inner in value.values() if is_map else value if spec.is_repeated else [value]:
            if isinstance(inner, Message):
                _refuse_unknown(inner)
