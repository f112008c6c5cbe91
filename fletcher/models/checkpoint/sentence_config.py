"""Settings that sentence-transformers keeps beside a Transformer module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fletcher.models.bundle.files import invalid_value, read_json
from fletcher.models.checkpoint.modules import check_known

# Names of the file, in the order in which sentence-transformers looks for them.
SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Older and newer names of arguments for the model, the tokenizer and config.json.
_MODEL = ("model_args", "model_kwargs")
_TOKENIZER = ("tokenizer_args", "processor_kwargs")
_CONFIG = ("config_args", "config_kwargs")
# Arguments of transformers' model and tokenizer classes that change no vector in float32.
_LOADING = (
    *("torch_dtype", "dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "backend"),
    *(
        "add_pooling_layer",
        "use_fast",
        "revision",
        "trust_remote_code",
        "padding_side",
        "cache_dir",
    ),
)
_TASKS = ("feature-extraction", "fill-mask")


@dataclass(frozen=True, slots=True)
class SentenceConfig:
    """Content of sentence_bert_config.json, or of a file under an older name.

    Attributes:
        name: Name of the file.
        max_length: Largest number of tokens of a text; None if the file does not say.
        lowercase: Whether texts are lower-cased before the tokenizer's own normalization.
        tokenizer: Settings that replace those of tokenizer_config.json.
        config: Settings that replace those of config.json.
    """

    name: str = SENTENCE_CONFIGS[0]
    max_length: object = None
    lowercase: bool = False
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path) -> SentenceConfig:
        """Read the first such file in `folder`; defaults if there is none.

        Raises:
            ModelError: The file is damaged, or has a setting that is not supported.
        """
        found = [name for name in SENTENCE_CONFIGS if (folder / name).is_file()]
        if not found:
            return cls()
        name, config = found[0], read_json(folder / found[0])
        arguments = (*_MODEL, *_TOKENIZER, *_CONFIG)
        plain = ("max_seq_length", "do_lower_case", "transformer_task", "unpad_inputs")
        # `modality_config` says which output of the model is read; the task decides that as well.
        described = ("modality_config", "module_output_name", "cache_dir")
        check_known(name, config, (*plain, *described, *arguments))
        if config.get("transformer_task") not in (None, *_TASKS):
            raise invalid_value(
                name, "transformer_task", config["transformer_task"], " or ".join(_TASKS), _TASKS
            )
        if config.get("module_output_name") not in (None, "token_embeddings"):
            value = config["module_output_name"]
            raise invalid_value(name, "module_output_name", value, "token_embeddings")
        check_known(f"{name}: {_MODEL[0]}", _arguments(name, config, _MODEL), _LOADING)
        tokenizer = _arguments(name, config, _TOKENIZER)
        lowercase = config.get("do_lower_case")
        if type(lowercase) is not bool and lowercase is not None:
            raise invalid_value(name, "do_lower_case", lowercase, "true or false")
        return cls(
            name=name,
            max_length=tokenizer.get("model_max_length", config.get("max_seq_length")),
            lowercase=bool(lowercase),
            tokenizer={key: one for key, one in tokenizer.items() if key not in _LOADING},
            config=_arguments(name, config, _CONFIG),
        )


def _arguments(place: str, config: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Arguments under an older or newer name; an empty dict if there are none."""
    found: dict[str, Any] = {}
    for name in names:
        value = config.get(name) or {}
        if not isinstance(value, dict):
            raise invalid_value(place, name, value, "an object")
        found |= value
    hub = ("trust_remote_code", "revision", "cache_dir", "token", "local_files_only", "subfolder")
    return {key: value for key, value in found.items() if key not in hub}
