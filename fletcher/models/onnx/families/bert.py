"""BERT and models with BERT's graph: BGE, GTE, E5, MiniLM, Arctic, RoBERTa, XLM-R."""

from __future__ import annotations

from fletcher.models.checkpoint.config_json import (
    Config,
    activation,
    epsilon,
    only,
    pad_token_id,
    positive,
    sizes,
)
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.families.family import Family, Layout

LAYOUT = Layout(
    layers="encoder.layer.{}.",
    model={
        "embeddings.words": "embeddings.word_embeddings",
        "embeddings.positions": "embeddings.position_embeddings",
        "embeddings.types": "embeddings.token_type_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
    },
    layer={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "projected": "attention.output.dense",
        "attention.norm": "attention.output.LayerNorm",
        "wide": "intermediate.dense",
        "narrow": "output.dense",
        "norm": "output.LayerNorm",
    },
)


def _read_roberta(config: Config) -> Architecture:
    # Positions up to the padding token's id are not used for text.
    return _read(config, position_offset=pad_token_id(config, 1) + 1)


def _read(config: Config, position_offset: int = 0) -> Architecture:
    only(
        config,
        position_embedding_type="absolute",
        is_causal=False,
        is_decoder=False,
        is_encoder_decoder=False,
        add_cross_attention=False,
    )
    return Architecture(
        **sizes(config, position_offset=position_offset),
        type_vocab_size=positive(config, "type_vocab_size"),
        epsilon=epsilon(config, 1e-12, "layer_norm_eps"),
        activation=activation(config, "hidden_act", "gelu"),
    )


BERT = Family("bert", _read, ("bert.",), (LAYOUT,))
ROBERTA = Family("roberta", _read_roberta, ("roberta.",), (LAYOUT,))
