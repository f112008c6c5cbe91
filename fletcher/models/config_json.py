"""Reads the numbers of a config.json; what is not as expected is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fletcher.errors import ModelError
from fletcher.models.encoder import ACTIVATIONS

Config = Mapping[str, Any]


def positive(config: Config, *keys: str) -> int:
    """An integer of at least 1 under the first of `keys` that is there.

    Raises:
        ModelError: It is missing or something else.
    """
    key = next((one for one in keys if config.get(one) is not None), keys[0])
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ModelError(f"config.json: `{key}` is {value!r}, expected at least 1", field=key)
    return value


def only(config: Config, **wanted: Any) -> None:
    """Checks settings that change what a model computes, where they are given and not null.

    Raises:
        ModelError: One has another value than the one that is supported.
    """
    for key, value in wanted.items():
        if config.get(key) not in (None, value):
            raise ModelError(
                f"config.json: `{key}` is {config[key]!r}, expected {value!r}; such models are not "
                "supported: export one to ONNX and add that file",
                field=key,
                allowed=[value],
            )


def activation(config: Config, key: str, default: str, **names: str) -> str:
    """One of ACTIVATIONS; `names` are what a family calls them beside.

    Raises:
        ModelError: It is another.
    """
    value = config.get(key, default)
    value = names.get(value, value)
    if value not in ACTIVATIONS:
        allowed = [*ACTIVATIONS, *names]
        raise ModelError(
            f"config.json: `{key}` is {value!r}, expected one of {', '.join(allowed)}",
            field=key,
            allowed=allowed,
        )
    return str(value)


def heads(config: Config, hidden: int, *keys: str) -> int:
    """The number of heads that `hidden` is divided into.

    Raises:
        ModelError: It does not divide.
    """
    number = positive(config, *keys)
    if hidden % number:
        raise ModelError(
            f"config.json: `hidden_size` {hidden} is no multiple of `{keys[0]}` {number}",
            field="hidden_size",
        )
    return number


def theta(config: Config, default: float, *keys: str, layers: str = "") -> float:
    """Theta of rotary positions.

    Args:
        config: config.json.
        default: Where it is not given.
        keys: Where checkpoints keep it outside of `rope_parameters`.
        layers: The kind of layers, where `rope_parameters` has some for each kind.

    Raises:
        ModelError: Positions are scaled, or only a part of each head is rotated.
    """
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        rope = rope.get(layers, rope) if isinstance(rope, dict) else {"rope_type": rope}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ModelError(
                f"config.json: `{key}` is of type {kind!r}, expected default; rotary positions "
                "are not scaled here: export the model to ONNX and add that file",
                field=key,
                allowed=["default"],
            )
        only(rope, partial_rotary_factor=1.0)
        value = rope.get("rope_theta", value)
    only(config, partial_rotary_factor=1.0)
    if type(value) not in (int, float) or value <= 0:
        raise ModelError(f"config.json: theta of rotary positions is {value!r}", field="rope_theta")
    return float(value)
