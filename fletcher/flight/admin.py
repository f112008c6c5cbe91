"""Actions of operators: list, load, swap and unload models, and set aliases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from fletcher.config.model_alias import Alias
from fletcher.errors import InvalidCommandError
from fletcher.flight.commands import parse_list_models
from fletcher.flight.requests import AliasRequest, ModelRequest, UnloadRequest, decode_request
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.serving.model_manager import ModelManager
from fletcher.v1 import embed_pb2

IsCancelled = Callable[[], bool]

_RUNNING = ("is_default", "state", "is_current", "calls", "memory_bytes")


def list_models(models: ModelManager, body: bytes) -> bytes:
    """The models and aliases, as JSON or protobuf (a ListModelsResult).

    Raises:
        FletcherError: As `parse_list_models`.
    """
    request = parse_list_models(body)
    bundles = models.bundles()
    entries = [
        (bundle, one)
        for one in models.describe()
        if (bundle := bundles.get(f"{one['name']}@{one['hash']}")) is not None
    ]
    return encode_models(entries, models.aliases(), format_name=request.format)


def load_model(models: ModelManager, body: bytes, is_cancelled: IsCancelled) -> dict[str, Any]:
    """Load an installed model; return when it is ready.

    Raises:
        FletcherError: As `ModelManager.load_model` and `decode_request`.
    """
    return {"model": models.load_model(decode_request(ModelRequest, body).model, is_cancelled)}


def swap_model(models: ModelManager, body: bytes, is_cancelled: IsCancelled) -> dict[str, Any]:
    """Replace a name's version by the installed one; return when it is ready.

    Raises:
        FletcherError: As `ModelManager.swap_model` and `decode_request`.
    """
    return {"model": models.swap_model(decode_request(ModelRequest, body).model, is_cancelled)}


def unload_model(models: ModelManager, body: bytes) -> dict[str, Any]:
    """Take a model out of service.

    Raises:
        FletcherError: As `ModelManager.unload_model` and `decode_request`.
    """
    request = decode_request(UnloadRequest, body)
    return {"model": models.unload_model(request.model, force=request.force)}


def set_alias(models: ModelManager, body: bytes) -> dict[str, Any]:
    """Divide calls between models, or remove the alias if no models are given.

    Raises:
        FletcherError: As `ModelManager.set_alias` and `decode_request`.
    """
    request = decode_request(AliasRequest, body)
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


def encode_models(
    models: Sequence[tuple[ModelBundle, Mapping[str, Any]]],
    aliases: Mapping[str, str],
    *,
    format_name: str = "json",
) -> bytes:
    """Encode the answer of `list_models`.

    Args:
        models: Bundles, each with `is_default`, `state`, `is_current`, `calls` and `memory_bytes`
            of its version.
        aliases: Each alias' models and weights.
        format_name: `json` for `{"models": [{...ModelInfo}], "aliases": {...}}`, or `protobuf`.
    """
    infos = [_model_info(bundle) | {name: run[name] for name in _RUNNING} for bundle, run in models]
    if format_name == "protobuf":
        result = embed_pb2.ListModelsResult(
            models=[embed_pb2.ModelInfo(**info) for info in infos], aliases=aliases
        )
        return bytes(result.SerializeToString())
    return msgspec.json.encode({"models": infos, "aliases": dict(aliases)})


def _model_info(bundle: ModelBundle) -> dict[str, Any]:
    return {
        "name": bundle.name,
        "hash": bundle.hash,
        "family": bundle.family,
        "dim": bundle.dim,
        "max_length": bundle.max_length,
        "pooling": bundle.pooling,
        "normalize": bundle.normalize,
        "num_layers": bundle.num_layers,
        "layers": list(bundle.layers),
        "dims": list(bundle.dims),
        "prompts": dict(bundle.prompts),
        "output": bundle.output,
    }
