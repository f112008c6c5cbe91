"""DistilBERT: BERT without token types, under other names."""

from __future__ import annotations

from fletcher.models.architecture import Architecture
from fletcher.models.config_json import Config, activation, heads, positive
from fletcher.models.families.family import Family, Layout


def _read(config: Config) -> Architecture:
    hidden = positive(config, "dim")
    return Architecture(
        vocab_size=positive(config, "vocab_size"),
        max_length=positive(config, "max_position_embeddings"),
        hidden=hidden,
        intermediate=positive(config, "hidden_dim"),
        num_heads=heads(config, hidden, "n_heads"),
        num_layers=positive(config, "n_layers"),
        epsilon=1e-12,
        activation=activation(config, "activation", "gelu"),
        pad_token_id=int(config.get("pad_token_id") or 0),
    )


DISTILBERT = Family(
    "distilbert",
    _read,
    ("distilbert.",),
    (
        Layout(
            layers="transformer.layer.{}.",
            model={
                "embeddings.words": "embeddings.word_embeddings",
                "embeddings.positions": "embeddings.position_embeddings",
                "embeddings.norm": "embeddings.LayerNorm",
            },
            layer={
                "q": "attention.q_lin",
                "k": "attention.k_lin",
                "v": "attention.v_lin",
                "projected": "attention.out_lin",
                "attention.norm": "sa_layer_norm",
                "wide": "ffn.lin1",
                "narrow": "ffn.lin2",
                "norm": "output_layer_norm",
            },
        ),
    ),
)
