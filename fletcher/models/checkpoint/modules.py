"""Modules of sentence-transformers, which turn a text into a vector one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fletcher.errors import ModelError
from fletcher.models.bundle.files import (
    damage_named,
    invalid_choice,
    invalid_value,
    is_inside,
    read_json,
    read_optional_json,
)
from fletcher.models.checkpoint.config_json import EXPORT

# Modules without Dropout, which does nothing after training.
_ORDER = re.compile(
    r"Transformer( Pooling( Dense)*( Normalize)*|( Dense)+)?|(MLM)?Transformer SpladePooling"
    r"|StaticEmbedding( Dense)*( Normalize)*"
)
# Packages whose modules Fletcher knows. A module of another package has the same name by chance.
_PACKAGES = ("sentence_transformers.", "pylate.models.")
# Our names of activation functions, by the name of the torch class.
_DENSE_ACTIVATIONS = {
    "Identity": "",
    "Tanh": "tanh",
    "GELU": "gelu",
    "ReLU": "relu",
    "SiLU": "silu",
}
# Our names of poolings by the names of sentence-transformers, in the order in which it concatenates
# several of them that are set as flags.
_POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
}
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class DenseModule:
    """A linear layer after pooling: the module Dense of sentence-transformers.

    Attributes:
        folder: Folder of the layer's weights, `linear.weight` [to, from] and `linear.bias` [to].
        shape: Shape (to, from) of the weight.
        bias: Whether the layer has a bias.
        activation: Activation function, one of `encoder.ACTIVATIONS`; empty for none.
    """

    folder: Path
    shape: tuple[int, int]
    bias: bool
    activation: str


def read_modules(folder: Path) -> dict[str, list[str]]:
    """Read the folders of a checkpoint's modules, by class name.

    An empty folder name stands for `folder` itself. A checkpoint without modules.json is a single
    Transformer.

    Raises:
        ModelError: modules.json is damaged, or lists other modules or another order.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return {"Transformer": [""]}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        modules = [(str(one["type"]), str(one["path"])) for one in listed]
        kwargs = [one.get("kwargs") for one in listed]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise ModelError("modules.json is not a list of sentence-transformers modules") from None
    places: dict[str, list[str]] = {}
    for (kind, place), more in zip(modules, kwargs, strict=True):
        if not kind.startswith(_PACKAGES):
            raise ModelError(
                f"modules.json lists {kind[:200]}, expected modules of sentence-transformers: "
                f"Fletcher does not run other code; {EXPORT}",
                field="type",
            )
        if more:
            raise invalid_value("modules.json", "kwargs", more, "none")
        name = kind.rpartition(".")[2]
        if place and not is_inside(place):
            raise ModelError(
                f"modules.json: `path` of {name} is {place[:200]!r}, expected one inside the "
                "model's folder"
            )
        places.setdefault(name, []).append(place)
    names = [kind.rpartition(".")[2] for kind, _ in modules]
    if not _ORDER.fullmatch(" ".join(name for name in names if name != "Dropout")):
        raise ModelError(
            f"modules.json lists {', '.join(names)}: expected Transformer, Pooling, any number of "
            "Dense and perhaps Normalize; StaticEmbedding instead of the first two; Transformer "
            "and Dense, for token vectors; or MLMTransformer and SpladePooling. For another model, "
            f"{EXPORT}",
            allowed=["Transformer", "StaticEmbedding", "Pooling", "Dense", "Dropout", "Normalize"],
        )
    for place in places.get("Normalize", []):
        config = read_optional_json(folder / place / "config.json") if place else {}
        _check_names(f"{place}/config.json", config, "sentence_embedding")
    return places


def read_dense(folders: Iterable[Path], width: int, *, tokens: bool) -> tuple[DenseModule, ...]:
    """Read the Dense modules in `folders`; the first gets `width` dimensions.

    `tokens` says whether the modules follow token embeddings, as in PyLate, instead of pooling.

    Raises:
        ModelError: A setting is invalid or not supported.
    """
    modules = []
    for folder in folders:
        config = read_json(folder / "config.json")
        name = f"{folder.name}/config.json"
        entering, leaving = config.get("in_features"), config.get("out_features")
        if entering != width or type(leaving) is not int or not 1 <= leaving < 2**31:
            raise ModelError(
                f"{name}: `in_features` and `out_features` are {entering!r} and {leaving!r}, "
                f"expected {width} and at least 1",
                field="in_features",
            )
        known = ("in_features", "out_features", "bias", "activation_function", "use_residual")
        check_known(name, config, (*known, "module_input_name", "module_output_name"))
        # PyLate writes the name that it inherits from sentence-transformers, and does not use it.
        names = ("token_embeddings", "sentence_embedding") if tokens else ("sentence_embedding",)
        _check_names(name, config, *names)
        if config.get("use_residual"):
            raise invalid_value(name, "use_residual", config["use_residual"], "false")
        usual = "torch.nn.modules.linear.Identity" if tokens else "torch.nn.modules.activation.Tanh"
        function = str(config.get("activation_function", usual))
        package, _, short = function.rpartition(".")
        activation = _DENSE_ACTIVATIONS.get(short)
        if activation is None or not f"{package}.".startswith("torch.nn."):
            raise invalid_choice(
                name,
                "activation_function",
                function,
                [f"torch.nn.{one}" for one in _DENSE_ACTIVATIONS],
            )
        bias = config.get("bias", True)
        if type(bias) is not bool:
            raise invalid_value(name, "bias", bias, "true or false")
        modules.append(DenseModule(folder, (leaving, width), bias, activation))
        width = leaving
    return tuple(modules)


def read_pooling(folder: Path, width: int) -> str:
    """Read the pooling of the module in `folder`, as in ModelSpec.

    Raises:
        ModelError: A setting is invalid or not supported.
    """
    config, name = read_json(folder / "config.json"), f"{folder.name}/config.json"
    widths = ("embedding_dimension", "word_embedding_dimension")
    check_known(name, config, (*widths, "pooling_mode", "include_prompt", *_POOLING_FLAGS))
    for key in widths:
        if config.get(key) not in (None, width):
            raise invalid_value(name, key, config[key], f"{width}, the model's width")
    if config.get("include_prompt", True) is False:
        raise invalid_value(name, "include_prompt", False, "true")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    modes = modes if isinstance(modes, list) else [modes]
    with damage_named(name):
        names = [_POOLINGS.get(mode) for mode in modes]
    if not names or None in names:
        raise ModelError(
            f"{name}: `pooling_mode` is {', '.join(map(str, modes))[:200] or 'empty'}, expected "
            f"one or several of {', '.join(_POOLINGS)}",
            field="pooling_mode",
            allowed=list(_POOLINGS),
        )
    return "+".join(str(one) for one in names)


def check_known(place: str, config: Mapping[str, Any], known: Iterable[str]) -> None:
    """Check that a file has no unknown setting; null settings are accepted.

    Raises:
        ModelError: The file has another key.
    """
    known = tuple(known)
    for key, value in config.items():
        if key not in known and value not in (None, {}, []):
            raise ModelError(
                f"{place}: `{key}` is {repr(value)[:200]}, which is no setting that Fletcher "
                "knows, and could change vectors; if it does not, remove it",
                field=key,
                allowed=known,
            )


def _check_names(place: str, config: Mapping[str, Any], *names: str) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, *names):
            raise invalid_value(place, key, config[key], " or ".join(names))
