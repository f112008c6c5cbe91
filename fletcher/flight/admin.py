"""The actions that change which models run: bodies checked, answers as JSON-ready objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fletcher.config.model_alias import Alias
from fletcher.errors import InvalidCommandError, UnknownFieldError
from fletcher.serving.model_manager import ModelManager

GivenUp = Callable[[], bool]


def load_model(
    models: ModelManager, fields: Mapping[str, Any], given_up: GivenUp
) -> dict[str, Any]:
    """`{"model": name}`: loads an installed model; answers when it is ready.

    Raises:
        FletcherError: As `Models.load`, and for a body that is none.
    """
    _check(fields, "model")
    return {"model": models.load(_name(fields, "model"), given_up)}


def swap_model(
    models: ModelManager, fields: Mapping[str, Any], given_up: GivenUp
) -> dict[str, Any]:
    """`{"model": name}`: what is installed under a name takes its place; answers when it has.

    Raises:
        FletcherError: As `Models.swap`, and for a body that is none.
    """
    _check(fields, "model")
    return {"model": models.swap(_name(fields, "model"), given_up)}


def unload_model(models: ModelManager, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`{"model": name, "force": bool}`: takes a model out of service.

    Raises:
        FletcherError: As `Models.unload`, and for a body that is none.
    """
    _check(fields, "model", "force")
    force = fields.get("force", False)
    if not isinstance(force, bool):
        raise InvalidCommandError("`force` is not true or false", field="force")
    return {"model": models.unload(_name(fields, "model"), force=force)}


def set_alias(models: ModelManager, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`{"alias": name, "models": "a:0.9,b:0.1"}`: divides calls; no models: the alias goes.

    Raises:
        FletcherError: As `Models.set_alias`, and for a body that is none.
    """
    _check(fields, "alias", "models")
    name, shares = _name(fields, "alias"), fields.get("models")
    if not shares and isinstance(shares, (str, type(None))):
        models.remove_alias(name)
    else:
        try:
            models.set_alias(Alias.parse(f"{name}={shares}"))
        except ValueError:
            raise InvalidCommandError(
                f"`models` of alias {name[:200]!r} is {str(shares)[:200]!r}, expected "
                "MODEL:WEIGHT,MODEL:WEIGHT with weights over 0",
                field="models",
            ) from None
    return {"aliases": models.aliases()}


def _name(fields: Mapping[str, Any], field: str) -> str:
    name = fields.get(field)
    if not isinstance(name, str) or not name:
        raise InvalidCommandError(f"`{field}` is missing, or is no name", field=field)
    return name


def _check(fields: Mapping[str, Any], *known: str) -> None:
    for name in fields:
        if name not in known:
            raise UnknownFieldError(
                f"`{name[:200]}` is not a field of this action", field=name[:200], allowed=known
            )
