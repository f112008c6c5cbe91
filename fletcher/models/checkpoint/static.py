"""Static models: one vector for each token, without a transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fletcher.errors import ModelError
from fletcher.models.checkpoint.weights import Weights

STATIC = "static_embedding"
# Names of the table of embeddings, as sentence-transformers and model2vec write it.
_TABLES = ("embedding.weight", "embeddings")


def read_static_config(folder: Path) -> dict[str, Any]:
    """Derive the content of a config.json from the weights of a StaticEmbedding.

    Raises:
        ModelError: The weights are not one table of embeddings.
    """
    weights = Weights(folder, ())
    names = weights.tensor_names()
    if (
        len(names) != 1
        or names[0] not in _TABLES
        or len(shape := weights.tensor_shape(names[0])) != 2
    ):
        raise ModelError(
            f"the StaticEmbedding has the tensors {', '.join(names)[:200] or 'none'}, expected one "
            f"table, {' or '.join(_TABLES)}; save the model again with sentence-transformers"
        )
    return {"model_type": STATIC, "vocab_size": shape[0], "hidden_size": shape[1]}


def table_name(weights: Weights) -> str:
    """Name of the table of embeddings."""
    return next(name for name in _TABLES if weights.has(name))
