"""Readers of single values of config.json, which check the values.

msgspec is not used, because families name the same value differently, and null means a default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypedDict

from fletcher.errors import ModelError
from fletcher.models.bundle.files import invalid_choice, invalid_value
from fletcher.models.onnx.encoder import ACTIVATIONS

Config = Mapping[str, Any]

_MAX_NUMBER = 2**31  # larger numbers would overflow in NumPy and ONNX
_MAX_THETA = 1e30
# Upper limits: lists of all layers and heads are made before the weights show the true numbers.
_MAX_LAYERS = 10_000
_MAX_HEAD_NUMBER = 2**16

# Advice for a model that Fletcher writes no graph for: `sources.onnx` takes such a file.
EXPORT = (
    "export the model with its pooling to ONNX, with the inputs `input_ids` and `attention_mask` "
    "and the output `sentence_embedding`, and add that file"
)


class Sizes(TypedDict):
    """Numbers of an `Architecture` that are read from config.json for every family."""

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
    """Read the numbers that all families have.

    Args:
        config: Content of config.json.
        names: The family's key for a common key, such as `dim` for `hidden_size`. If the family's
            key is missing, the common key is read.
        position_offset: Row of the table of positions that belongs to a text's first token.
        head_dim: Width of a head, if config.json does not state the width. With 0, the width is
            `hidden_size` divided by the number of heads.

    Raises:
        ModelError: A number is missing or invalid, or `hidden_size` is not a multiple of the number
            of heads.
    """

    def number(name: str) -> int:
        return positive(config, *((names[name], name) if name in names else (name,)))

    def bounded(name: str, most: int) -> int:
        if (value := number(name)) > most:
            raise invalid_value("config.json", names.get(name, name), value, f"1 to {most:,}")
        return value

    hidden = number("hidden_size")
    num_heads = bounded("num_attention_heads", _MAX_HEAD_NUMBER)
    if head_dim:
        head_dim = positive(config, "head_dim", default=head_dim)
        if head_dim > _MAX_HEAD_NUMBER:
            raise invalid_value("config.json", "head_dim", head_dim, f"1 to {_MAX_HEAD_NUMBER:,}")
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
        "num_layers": bounded("num_hidden_layers", _MAX_LAYERS),
        "pad_token_id": pad_token_id(config, 0),
    }


def positive(config: Config, *keys: str, default: int | None = None) -> int:
    """Read an integer of at least 1 under the first of `keys` that is not null.

    Without such a key, the result is `default`.

    Raises:
        ModelError: The value is not such an integer, or is missing and there is no `default`.
    """
    key = next((one for one in keys if config.get(one) is not None), keys[0])
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or not 1 <= value < _MAX_NUMBER:
        raise invalid_value("config.json", key, value, "at least 1")
    return value


def flag(config: Config, key: str, *, default: bool) -> bool:
    """Read a boolean; `default` if it is missing or null.

    Raises:
        ModelError: The value is no boolean.
    """
    value = default if config.get(key) is None else config[key]
    if type(value) is not bool:
        raise invalid_value("config.json", key, value, "true or false")
    return value


def pad_token_id(config: Config, default: int) -> int:
    """Read the padding token's id; `default` if the id is missing or null.

    Raises:
        ModelError: The value is not an integer of at least 0.
    """
    value = default if config.get("pad_token_id") is None else config["pad_token_id"]
    if type(value) is not int or not 0 <= value < _MAX_NUMBER:
        raise invalid_value("config.json", "pad_token_id", value, "a token id")
    return value


def epsilon(config: Config, default: float, *keys: str) -> float:
    """Read the norms' epsilon under the first of `keys` that is not null.

    If all are null or missing, the result is `default`.

    Raises:
        ModelError: The value is not a number from 0 to below 1.
    """
    key = next((one for one in keys if config.get(one) is not None), "")
    value = config[key] if key else default
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise invalid_value("config.json", key, value, "0 to 1")
    return float(value)


def layer_types(config: Config, default: list[str], *allowed: str) -> list[str]:
    """Read the kind of each layer; `default` if config.json does not state the kinds.

    Raises:
        ModelError: The number of kinds differs from `default`, or a kind is not in `allowed`.
    """
    kinds = config.get("layer_types") or default
    known = isinstance(kinds, list) and all(kind in allowed for kind in kinds)
    if not known or len(kinds) != len(default):
        expected = f"{len(default)} of {' and '.join(allowed)}"
        raise invalid_value("config.json", "layer_types", kinds, expected, allowed)
    return list(kinds)


def only(config: Config, **wanted: Any) -> None:
    """Check that each setting is missing, is null, or has the supported value.

    Raises:
        ModelError: A setting has another value.
    """
    for key, value in wanted.items():
        if config.get(key) not in (None, value):
            expected = f"{value!r}; Fletcher writes no graph for other models: {EXPORT}"
            raise invalid_value("config.json", key, config[key], expected, [value])


def activation(config: Config, key: str, default: str, **names: str) -> str:
    """Read the activation function, one of ACTIVATIONS.

    `names` maps the family's names of functions to those in ACTIVATIONS.

    Raises:
        ModelError: The function is not supported.
    """
    value = config.get(key, default)
    value = names.get(str(value), value)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise invalid_choice("config.json", key, value, [*ACTIVATIONS, *names])
    return value


def theta(
    config: Config,
    default: float,
    *keys: str,
    layers: str = "",
    kinds: Sequence[str] = ("default",),
) -> float:
    """Read theta of rotary positions.

    Theta is taken from `rope_parameters` or `rope_scaling`, else from the first of `keys` that is
    not null, else from `default`. `layers` is the kind of layer to read theta for, if
    `rope_parameters` has separate values for each kind of layer. `kinds` are the kinds of scaling
    that the family supports.

    Raises:
        ModelError: Theta is invalid, positions are scaled, or only a part of each head is rotated.
    """
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        rope = rope.get(layers, rope) if isinstance(rope, dict) else rope
        rope = rope if isinstance(rope, dict) else {"rope_type": rope}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in kinds:
            raise ModelError(
                f"config.json: `{key}` is of type {kind!r}, expected {' or '.join(kinds)}; "
                f"other rotary positions are not supported: {EXPORT}",
                field=key,
                allowed=kinds,
            )
        only(rope, partial_rotary_factor=1.0)
        value = rope.get("rope_theta", value)
    only(config, partial_rotary_factor=1.0)
    if type(value) not in (int, float) or not 1 < value < _MAX_THETA:
        raise invalid_value("config.json", "rope_theta", value, f"above 1 and below {_MAX_THETA:g}")
    return float(value)


def yarn(config: Config) -> tuple[float, ...]:
    """Read the scaling of rotary positions; empty if they are not scaled.

    The factor is fixed, so a text's vector does not depend on the lengths of other texts.

    Raises:
        ModelError: A number is missing or invalid.
    """
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "yarn":
            continue

        def number(name: str, default: float | None = None, rope: Config = rope) -> float:
            value: Any = default if rope.get(name) is None else rope[name]
            if type(value) not in (int, float) or not 0 < value < 1e9:
                raise invalid_value("config.json", name, value, "a number above 0")
            return float(value)

        factor = number("factor")
        mscale = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            only(rope, mscale=rope["mscale_all_dim"])  # their ratio is the factor of cosines
            mscale = 1.0
        known = """
            rope_type type rope_theta factor attention_factor beta_fast beta_slow mscale
            mscale_all_dim original_max_position_embeddings truncate partial_rotary_factor
        """
        for name, value in rope.items():
            if name not in known.split():
                raise invalid_value("config.json", name, value, f"absent from `{key}`")
        return (
            factor,
            number("original_max_position_embeddings", config.get("max_position_embeddings")),
            number("beta_fast", 32),
            number("beta_slow", 1),
            number("attention_factor", mscale),
            float(flag(rope, "truncate", default=True)),
        )
    return ()
