"""ModernBERT: local and global layers, two rotary thetas, norms first, gated MLP."""

from __future__ import annotations

from fletcher.models.checkpoint.config_json import (
    Config,
    activation,
    epsilon,
    layer_types,
    positive,
    sizes,
    theta,
)
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.families.family import Family, Layout, fused

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def _read(config: Config) -> Architecture:
    numbers = sizes(config)
    every = positive({"global_attn_every_n_layers": 3, **config}, "global_attn_every_n_layers")
    usual = [_LOCAL if index % every else _GLOBAL for index in range(numbers["num_layers"])]
    kinds = layer_types(config, usual, _GLOBAL, _LOCAL)
    thetas = {
        _GLOBAL: theta(config, 160_000.0, "global_rope_theta", layers=_GLOBAL),
        _LOCAL: theta(config, 10_000.0, "local_rope_theta", layers=_LOCAL),
    }
    both_sides = positive({"local_attention": 128, **config}, "local_attention")
    reach = {_GLOBAL: 0, _LOCAL: both_sides // 2}
    biases = ("q", "k", "v", "projected") if config.get("attention_bias", False) else ()
    if config.get("mlp_bias", False):
        biases = (*biases, "wide", "gate", "narrow")
    return Architecture(
        **numbers,
        learned_positions=False,
        rotary=tuple(thetas[kind] for kind in kinds),
        windows=tuple(reach[kind] for kind in kinds),
        epsilon=epsilon(config, 1e-5, "norm_eps"),
        norm_first=True,
        norm_of_first=False,
        norm_bias=bool(config.get("norm_bias", False)),
        gated=True,
        activation=activation(config, "hidden_activation", "gelu"),
        biases=biases,
    )


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
)
