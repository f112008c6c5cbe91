"""The server's actions, each with its name, description and handler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec

from fletcher.config.model_alias import Alias
from fletcher.core.command import WIRE_VERSION, EmbedCommand
from fletcher.errors import InvalidCommandError, UnsupportedCallError
from fletcher.flight.commands import parse_list_models, refuse_unused
from fletcher.flight.embed_action import embed
from fletcher.flight.middleware import upload_owner
from fletcher.flight.requests import (
    AliasRequest,
    ModelRequest,
    UnloadRequest,
    decode_request,
    parse_json,
    to_json,
)
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.serving.callers import Caller
from fletcher.serving.service import Service
from fletcher.v1 import embed_pb2

# Fields of a ModelInfo: first those from a bundle, then those from its version.
_BUNDLE_FIELDS = (
    *("name", "hash", "family", "dim", "max_length", "pooling", "normalize", "num_layers"),
    *("layers", "dims", "prompts", "output"),
)
_VERSION_FIELDS = ("is_default", "state", "is_current", "calls", "memory_bytes")


@dataclass(frozen=True, slots=True)
class ActionHandler:
    """An action's description and handler."""

    description: str  # effect, body and result, for `list_actions`
    # Takes the service, the body and the caller. A returned dict is sent as JSON.
    handler: Callable[[Service, bytes, Caller], bytes | dict[str, Any] | list[bytes]]


def run_action(service: Service, name: str, body: bytes, caller: Caller) -> list[bytes]:
    """Run an action and return its results.

    Raises:
        UnsupportedCallError: The server has no such action.
        FletcherError: The handler failed.
    """
    action = ACTIONS.get(name)
    if action is None:
        raise UnsupportedCallError(
            f"unknown action {name[:200]!r}; known: {', '.join(ACTIONS)}",
            field="type",
            allowed=list(ACTIONS),
        )
    answer = action.handler(service, body, caller)
    if isinstance(answer, list):
        return answer
    return [answer if isinstance(answer, bytes) else to_json(answer)]


def encode_models(
    models: Sequence[tuple[ModelBundle, Mapping[str, Any]]],
    aliases: Mapping[str, str],
    *,
    format_name: str = "json",
) -> bytes:
    """Encode the answer of `list_models`.

    Args:
        models: Pairs of a bundle and its version's `is_default`, `state`, `is_current`, `calls` and
            `memory_bytes`.
        aliases: Each alias' models and weights.
        format_name: `json` for `{"models": [{...ModelInfo}], "aliases": {...}}`, or `protobuf`.
    """
    infos: list[dict[str, Any]] = [
        {name: getattr(bundle, name) for name in _BUNDLE_FIELDS}
        | {name: version[name] for name in _VERSION_FIELDS}
        for bundle, version in models
    ]
    if format_name == "protobuf":
        messages = [embed_pb2.ModelInfo(**info) for info in infos]
        result = embed_pb2.ListModelsResult(models=messages, aliases=aliases)
        return bytes(result.SerializeToString())
    return msgspec.json.encode({"models": infos, "aliases": dict(aliases)})


@cache
def _own_version() -> str:
    return version("longbow-fletcher")


def _ready(service: Service, _body: bytes, _caller: Caller) -> dict[str, Any]:
    ready = service.models.serves and not service.admission.draining.is_set()
    return {"ready": ready, "model": service.models.default.name}


def _upload_status(service: Service, body: bytes, caller: Caller) -> dict[str, Any]:
    fields = parse_json(body)
    refuse_unused("upload_status", fields)
    command = EmbedCommand.from_mapping(fields)
    if command.upload_id is not None:
        command = command.owned_by(upload_owner(caller))
    return service.delivery.upload_status(command)


def _delete_upload(service: Service, body: bytes, caller: Caller) -> dict[str, Any]:
    fields = parse_json(body)
    refuse_unused("delete_upload", fields)
    command = EmbedCommand.from_mapping(fields)
    for name in ("dataset", "upload_id"):
        if getattr(command, name) is None:
            raise InvalidCommandError(f"`{name}` is missing", field=name)
    command = command.owned_by(upload_owner(caller))
    return {"rows_deleted": service.delivery.delete_upload(command)}


def _list_models(service: Service, body: bytes, _caller: Caller) -> bytes:
    request, models = parse_list_models(body), service.models
    bundles = models.bundles()
    entries = [
        (bundle, one)
        for one in models.describe()
        if (bundle := bundles.get(f"{one['name']}@{one['hash']}")) is not None
    ]
    return encode_models(entries, models.aliases(), format_name=request.format)


def _load_model(service: Service, body: bytes, caller: Caller) -> dict[str, Any]:
    service.admission.check_draining()
    request = decode_request(ModelRequest, body)
    return {"model": service.models.load_model(request.model, caller.is_cancelled)}


def _swap_model(service: Service, body: bytes, caller: Caller) -> dict[str, Any]:
    service.admission.check_draining()
    request = decode_request(ModelRequest, body)
    return {"model": service.models.swap_model(request.model, caller.is_cancelled)}


def _unload_model(service: Service, body: bytes, _caller: Caller) -> dict[str, Any]:
    request = decode_request(UnloadRequest, body)
    return {"model": service.models.unload_model(request.model, force=request.force)}


def _set_alias(service: Service, body: bytes, _caller: Caller) -> dict[str, Any]:
    request, models = decode_request(AliasRequest, body), service.models
    if not request.models:
        models.remove_alias(request.alias)
    else:
        try:
            models.set_alias(Alias.from_text(f"{request.alias}={request.models}"))
        except ValueError:
            raise InvalidCommandError(
                f"`models` of alias {request.alias[:200]!r} is {request.models[:200]!r}, expected "
                "MODEL:WEIGHT,MODEL:WEIGHT with weights over 0",
                field="models",
            ) from None
    return {"aliases": models.aliases()}


ACTIONS = {
    "health": ActionHandler(
        "Tells that the process is alive. No body. Result: JSON",
        lambda _service, _body, _caller: {
            "status": "ok",
            "version": _own_version(),
            "wire": WIRE_VERSION,
        },
    ),
    "ready": ActionHandler("Tells whether new calls are accepted. No body. Result: JSON", _ready),
    "stats": ActionHandler(
        "Gives counters, durations, queues and workers. No body. Result: JSON",
        lambda service, _body, _caller: service.statistics(),
    ),
    "list_models": ActionHandler(
        'Lists the models. Body: empty or {"format": "json"|"protobuf"}', _list_models
    ),
    "embed": ActionHandler(
        'Embeds a few texts. Body: {"texts": [...], ...EmbedCommand}. One or more results: JSON',
        embed,
    ),
    "upload_status": ActionHandler(
        'Gives the durable rows of an upload. Body: {"upload_id", "dataset"?, "store"?}. '
        "Result: JSON",
        _upload_status,
    ),
    "delete_upload": ActionHandler(
        'Deletes the rows of an upload from its store. Body: {"upload_id", "dataset", "store"?}. '
        "Result: JSON",
        _delete_upload,
    ),
    "load_model": ActionHandler(
        'Loads an installed model; answers when it is ready. Body: {"model"}', _load_model
    ),
    "swap_model": ActionHandler(
        'Replaces the running version by the installed one. Body: {"model"}', _swap_model
    ),
    "unload_model": ActionHandler(
        'Takes a model out of service. Body: {"model", "force"?}', _unload_model
    ),
    "set_alias": ActionHandler(
        'Divides calls between models. Body: {"alias", "models": "a:0.9,b:0.1"}; without models '
        "the alias is removed",
        _set_alias,
    ),
}
