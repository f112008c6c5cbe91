"""Checked values of a config.json.

msgspec is not used: families name the same value differently, and null means a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypedDict

from fletcher.errors import ModelError
from fletcher.models.bundle.files import invalid_choice, invalid_value
from fletcher.models.onnx.encoder import ACTIVATIONS

Config = Mapping[str, Any]


class Sizes(TypedDict):
    """Numbers of an `Architecture` that every config.json has."""

    vocab_size: int
    max_length: int
    position_offset: int
    hidden: int
    intermediate: int
    num_heads: int
    head_dim: int
    num_layers: int
    pad_token_id: int


def sizes(
    config: Config,
    names: Mapping[str, str] = MappingProxyType({}),
    *,
    position_offset: int = 0,
    head_dim: int = 0,
) -> Sizes:
    """The numbers that all families have, under the family's names.

    Args:
        config: config.json.
        names: The family's names for some of them, such as `dim` for `hidden_size`; the common name
            is the second choice.
        position_offset: Row of the first token in the table of positions.
        head_dim: Width of a head if config.json has none; 0 divides `hidden_size` by the heads.

    Raises:
        ModelError: A number is missing, or `hidden_size` does not divide into heads.
    """

    def number(name: str) -> int:
        return positive(config, *((names[name], name) if name in names else (name,)))

    hidden, num_heads = number("hidden_size"), number("num_attention_heads")
    if head_dim:
        head_dim = positive({"head_dim": head_dim, **config}, "head_dim")
    elif hidden % num_heads:
        heads = names.get("num_attention_heads", "num_attention_heads")
        raise ModelError(
            f"config.json: `hidden_size` {hidden} is no multiple of `{heads}` {num_heads}",
            field="hidden_size",
        )
    return {
        "vocab_size": number("vocab_size"),
        "max_length": number("max_position_embeddings") - position_offset,
        "position_offset": position_offset,
        "hidden": hidden,
        "intermediate": number("intermediate_size"),
        "num_heads": num_heads,
        "head_dim": head_dim,
        "num_layers": number("num_hidden_layers"),
        "pad_token_id": pad_token_id(config, 0),
    }


def positive(config: Config, *keys: str) -> int:
    """An integer of at least 1 under the first of `keys` that is not null.

    Raises:
        ModelError: It is missing or something else.
    """
    key = next((one for one in keys if config.get(one) is not None), keys[0])
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise invalid_value("config.json", key, value, "at least 1")
    return value


def pad_token_id(config: Config, default: int) -> int:
    """Id of the padding token; `default` if it is missing or null.

    Raises:
        ModelError: It is something else.
    """
    value = default if config.get("pad_token_id") is None else config["pad_token_id"]
    if type(value) is not int or value < 0:
        raise invalid_value("config.json", "pad_token_id", value, "a token id")
    return value


def epsilon(config: Config, default: float, *keys: str) -> float:
    """Epsilon of norms, under the first of `keys` that is not null; else `default`.

    Raises:
        ModelError: It is something else.
    """
    key = next((one for one in keys if config.get(one) is not None), "")
    value = config[key] if key else default
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise invalid_value("config.json", key, value, "0 to 1")
    return float(value)


def layer_types(config: Config, default: list[str], *allowed: str) -> list[str]:
    """Kind of each layer; `default` if config.json has none.

    Raises:
        ModelError: There are more or fewer than in `default`, or one is not in `allowed`.
    """
    kinds = config.get("layer_types") or default
    known = isinstance(kinds, list) and all(kind in allowed for kind in kinds)
    if not known or len(kinds) != len(default):
        expected = f"{len(default)} of {' and '.join(allowed)}"
        raise invalid_value("config.json", "layer_types", kinds, expected, allowed)
    return list(kinds)


def only(config: Config, **wanted: Any) -> None:
    """Check that settings are missing, null, or have the supported value.

    Raises:
        ModelError: A setting has another value.
    """
    for key, value in wanted.items():
        if config.get(key) not in (None, value):
            remedy = "such models are not supported: export one to ONNX and add that file"
            expected = f"{value!r}; {remedy}"
            raise invalid_value("config.json", key, config[key], expected, [value])


def activation(config: Config, key: str, default: str, **names: str) -> str:
    """Activation function, one of ACTIVATIONS; `names` has the family's names.

    Raises:
        ModelError: The function is another one.
    """
    value = config.get(key, default)
    value = names.get(str(value), value)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise invalid_choice("config.json", key, value, [*ACTIVATIONS, *names])
    return value


def theta(config: Config, default: float, *keys: str, layers: str = "") -> float:
    """Theta of rotary positions: from `rope_parameters`, one of `keys`, or `default`.

    `layers` is the kind of layers, if `rope_parameters` has values for each kind.

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
        raise invalid_value("config.json", "rope_theta", value, "a number above 0")
    return float(value)
