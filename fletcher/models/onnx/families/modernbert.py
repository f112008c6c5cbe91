"""ModernBERT: local and global layers, two rotary thetas, norms first, gated MLP."""

from __future__ import annotations

from fletcher.models.checkpoint.config_json import (
    Config,
    activation,
    epsilon,
    flag,
    layer_types,
    only,
    positive,
    sizes,
    theta,
)
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.families.family import Family, Layout, fused

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def _read(config: Config) -> Architecture:
    only(config, is_causal=False, is_decoder=False, is_encoder_decoder=False)
    numbers = sizes(config)
    every = positive(config, "global_attn_every_n_layers", default=3)
    usual = [_LOCAL if index % every else _GLOBAL for index in range(numbers["num_layers"])]
    kinds = layer_types(config, usual, _GLOBAL, _LOCAL)
    thetas = {
        _GLOBAL: theta(config, 160_000.0, "global_rope_theta", layers=_GLOBAL),
        _LOCAL: theta(config, 10_000.0, "local_rope_theta", layers=_LOCAL),
    }
    both_sides = positive(config, "local_attention", default=128)
    reach = {_GLOBAL: 0, _LOCAL: both_sides // 2}
    biases = ("q", "k", "v", "projected") if flag(config, "attention_bias", default=False) else ()
    if flag(config, "mlp_bias", default=False):
        biases = (*biases, "wide", "gate", "narrow")
    return Architecture(
        **numbers,
        learned_positions=False,
        rotary=tuple(thetas[kind] for kind in kinds),
        windows=tuple(reach[kind] for kind in kinds),
        epsilon=epsilon(config, 1e-5, "norm_eps"),
        norm_first=True,
        norm_of_first=False,
        norm_bias=flag(config, "norm_bias", default=False),
        gated=True,
        activation=activation(config, "hidden_activation", "gelu"),
        biases=biases,
    )


_IGNORED = """
    decoder_bias deterministic_flash_attn initializer_cutoff_factor layer_norm_eps
    position_embedding_type reference_compile repad_logits_with_grad sparse_pred_ignore_index
    sparse_prediction
"""

MODERNBERT = Family(
    "modernbert",
    _read,
    ("model.",),
    (
        Layout(
            layers="layers.{}.",
            model={
                "embeddings.words": "embeddings.tok_embeddings",
                "embeddings.norm": "embeddings.norm",
                "final.norm": "final_norm",
            },
            layer={
                **fused("attn.Wqkv", "qkv"),
                "projected": "attn.Wo",
                "attention.norm": "attn_norm",
                **fused("mlp.Wi", ("gate", "wide")),
                "narrow": "mlp.Wo",
                "norm": "mlp_norm",
            },
        ),
    ),
    frozenset(_IGNORED.split()),
)
