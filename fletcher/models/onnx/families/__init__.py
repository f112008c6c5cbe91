"""Model families that Fletcher writes graphs for, by `model_type` in config.json.

To add a family, write a module that reads the family's config.json and names its tensors. Then add
a line to FAMILIES.
"""

from __future__ import annotations

from fletcher.models.bundle.files import invalid_choice
from fletcher.models.checkpoint.config_json import EXPORT, Config
from fletcher.models.onnx.families.bert import BERT, ROBERTA
from fletcher.models.onnx.families.distilbert import DISTILBERT
from fletcher.models.onnx.families.family import Family
from fletcher.models.onnx.families.jina_bert import JINA_BERT
from fletcher.models.onnx.families.modernbert import MODERNBERT
from fletcher.models.onnx.families.mpnet import MPNET
from fletcher.models.onnx.families.nomic_bert import NOMIC_BERT
from fletcher.models.onnx.families.qwen3 import QWEN3
from fletcher.models.onnx.families.static import STATIC_EMBEDDING

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "camembert": ROBERTA,
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
    "mpnet": MPNET,
    "nomic_bert": NOMIC_BERT,
    "qwen3": QWEN3,
    "roberta": ROBERTA,
    "static_embedding": STATIC_EMBEDDING,
    "xlm-roberta": ROBERTA,
}


def family_of(config: Config) -> Family:
    """Find the family of a checkpoint by its config.json.

    Raises:
        ModelError: The checkpoint's `model_type` is not supported.
    """
    kind = config.get("model_type")
    if kind == "bert" and config.get("position_embedding_type") == "alibi":
        return JINA_BERT  # JinaBERT has BERT's `model_type`
    family = FAMILIES.get(str(kind))
    if family is None:
        remedy = f"; Fletcher writes no graph for other models: {EXPORT}"
        raise invalid_choice("config.json", "model_type", kind, FAMILIES, remedy)
    return family
