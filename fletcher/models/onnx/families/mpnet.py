"""MPNet: BERT with learned biases for buckets of distances, as in T5."""

from __future__ import annotations

from fletcher.models.checkpoint.config_json import Config, activation, epsilon, only, sizes
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.families.bert import LAYOUT
from fletcher.models.onnx.families.family import Family, Layout

# Positions 0 and 1 are not used for text, whatever `pad_token_id` in config.json is.
_POSITION_OFFSET = 2


def _read(config: Config) -> Architecture:
    only(config, relative_attention_num_buckets=32, is_decoder=False, is_encoder_decoder=False)
    return Architecture(
        **sizes(config, position_offset=_POSITION_OFFSET),
        distance_bias="buckets",
        epsilon=epsilon(config, 1e-12, "layer_norm_eps"),
        activation=activation(config, "hidden_act", "gelu"),
    )


MPNET = Family(
    "mpnet",
    _read,
    ("mpnet.",),
    (
        Layout(
            layers=LAYOUT.layers,
            model={**LAYOUT.model, "distances": "encoder.relative_attention_bias"},
            layer={
                **LAYOUT.layer,
                "q": "attention.attn.q",
                "k": "attention.attn.k",
                "v": "attention.attn.v",
                "projected": "attention.attn.o",
                "attention.norm": "attention.LayerNorm",
            },
        ),
    ),
)
