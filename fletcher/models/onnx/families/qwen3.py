"""Qwen3 as an embedding model: a causal decoder with last-token pooling."""

from __future__ import annotations

from fletcher.errors import ModelError
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
    yarn,
)
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.families.family import Family, Layout


def _read(config: Config) -> Architecture:
    only(config, is_encoder_decoder=False, use_sliding_window=False)
    numbers = sizes(config, head_dim=128)
    full = "full_attention"
    layer_types(config, [full] * numbers["num_layers"], full)
    num_heads = numbers["num_heads"]
    num_kv_heads = positive(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: `num_attention_heads` is {num_heads}, expected a multiple of "
            f"`num_key_value_heads` {num_kv_heads}",
            field="num_key_value_heads",
        )
    theta_of_all = theta(config, 10_000.0, "rope_theta", kinds=("default", "yarn"))
    has_biases = flag(config, "attention_bias", default=False)
    return Architecture(
        **numbers,
        learned_positions=False,
        embedding_norm=False,
        rotary=(theta_of_all,) * numbers["num_layers"],
        yarn=yarn(config),
        causal=flag(config, "is_causal", default=True),
        num_kv_heads=num_kv_heads,
        head_norm=True,
        epsilon=epsilon(config, 1e-6, "rms_norm_eps"),
        norm_first=True,
        rms_norm=True,
        gated=True,
        activation=activation(config, "hidden_act", "silu"),
        biases=("q", "k", "v", "projected") if has_biases else (),
    )


QWEN3 = Family(
    "qwen3",
    _read,
    ("model.",),
    (
        Layout(
            layers="layers.{}.",
            model={"embeddings.words": "embed_tokens", "final.norm": "norm"},
            layer={
                "q": "self_attn.q_proj",
                "k": "self_attn.k_proj",
                "v": "self_attn.v_proj",
                "q.norm": "self_attn.q_norm",
                "k.norm": "self_attn.k_norm",
                "projected": "self_attn.o_proj",
                "attention.norm": "input_layernorm",
                "gate": "mlp.gate_proj",
                "wide": "mlp.up_proj",
                "narrow": "mlp.down_proj",
                "norm": "post_attention_layernorm",
            },
        ),
    ),
    frozenset(("max_window_layers", "sliding_window")),
)
