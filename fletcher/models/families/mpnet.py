"""MPNet: BERT with learned biases for buckets of distances, as T5 has them."""

from __future__ import annotations

from fletcher.models.architecture import Architecture
from fletcher.models.config_json import Config, activation, heads, only, positive
from fletcher.models.families.family import Family, Layout

# Position 0 and padding's position 1 are never a text's, whatever config.json calls its padding.
_POSITION_OFFSET = 2


def _read(config: Config) -> Architecture:
    only(config, relative_attention_num_buckets=32)
    hidden = positive(config, "hidden_size")
    return Architecture(
        vocab_size=positive(config, "vocab_size"),
        max_length=positive(config, "max_position_embeddings") - _POSITION_OFFSET,
        position_offset=_POSITION_OFFSET,
        distance_bias="buckets",
        hidden=hidden,
        intermediate=positive(config, "intermediate_size"),
        num_heads=heads(config, hidden, "num_attention_heads"),
        num_layers=positive(config, "num_hidden_layers"),
        epsilon=float(config.get("layer_norm_eps", 1e-12)),
        activation=activation(config, "hidden_act", "gelu"),
        pad_token_id=int(config.get("pad_token_id") or 0),
    )


MPNET = Family(
    "mpnet",
    _read,
    ("mpnet.",),
    (
        Layout(
            layers="encoder.layer.{}.",
            model={
                "embeddings.words": "embeddings.word_embeddings",
                "embeddings.positions": "embeddings.position_embeddings",
                "embeddings.norm": "embeddings.LayerNorm",
                "distances": "encoder.relative_attention_bias",
            },
            layer={
                "q": "attention.attn.q",
                "k": "attention.attn.k",
                "v": "attention.attn.v",
                "projected": "attention.attn.o",
                "attention.norm": "attention.LayerNorm",
                "wide": "intermediate.dense",
                "narrow": "output.dense",
                "norm": "output.LayerNorm",
            },
        ),
    ),
)
