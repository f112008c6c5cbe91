"""Static models such as StaticEmbedding: the mean of their tokens' embeddings."""

from __future__ import annotations

from fletcher.models.checkpoint.config_json import Config, positive
from fletcher.models.checkpoint.tokenizer_files import MAX_STATIC_LENGTH
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.families.family import Family


def _read(config: Config) -> Architecture:
    rows, hidden = positive(config, "vocab_size"), positive(config, "hidden_size")
    return Architecture(
        # A row of zeros follows the table. It stands for a text without tokens, whose vector is
        # zero in sentence-transformers.
        vocab_size=rows + 1,
        pad_token_id=rows,
        hidden=hidden,
        intermediate=1,
        num_heads=1,
        num_layers=0,
        max_length=MAX_STATIC_LENGTH,
        epsilon=0.0,
        activation="relu",
        learned_positions=False,
        embedding_norm=False,
    )


STATIC_EMBEDDING = Family("static", _read, (), (), is_static=True)
