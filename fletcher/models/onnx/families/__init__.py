"""The families of models that Fletcher writes graphs for, by `model_type` of config.json.

A new one is a module here, with a reader of its config.json and the names of its tensors, and a
line in FAMILIES.
"""

from __future__ import annotations

from fletcher.errors import ModelError
from fletcher.models.checkpoint.config_json import Config
from fletcher.models.onnx.families.bert import BERT, ROBERTA
from fletcher.models.onnx.families.distilbert import DISTILBERT
from fletcher.models.onnx.families.family import Family
from fletcher.models.onnx.families.jina_bert import JINA_BERT
from fletcher.models.onnx.families.modernbert import MODERNBERT
from fletcher.models.onnx.families.mpnet import MPNET
from fletcher.models.onnx.families.nomic_bert import NOMIC_BERT
from fletcher.models.onnx.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "camembert": ROBERTA,
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
    "mpnet": MPNET,
    "nomic_bert": NOMIC_BERT,
    "qwen3": QWEN3,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}


def family_of(config: Config) -> Family:
    """The family of a checkpoint.

    Raises:
        ModelError: There is none here for its `model_type`.
    """
    kind = config.get("model_type")
    if kind == "bert" and config.get("position_embedding_type") == "alibi":
        return JINA_BERT  # it calls itself so
    family = FAMILIES.get(str(kind))
    if family is None:
        raise ModelError(
            f"config.json: `model_type` is {kind!r}, graphs are written for "
            f"{', '.join(FAMILIES)}; export the model to ONNX and add that file instead",
            field="model_type",
            allowed=list(FAMILIES),
        )
    return family
