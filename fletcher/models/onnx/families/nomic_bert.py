"""NomicBERT: BERT with rotary positions and a gated MLP."""

from __future__ import annotations

from fletcher.errors import ModelError
from fletcher.models.checkpoint.config_json import (
    Config,
    activation,
    epsilon,
    flag,
    only,
    positive,
    sizes,
    theta,
)
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.families.family import Family, Layout, fused

# The published checkpoints use GPT-2's names. Checkpoints that the library transformers writes use
# the common names.
_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}


def _read(config: Config) -> Architecture:
    only(
        config,
        causal=False,
        is_causal=False,
        is_decoder=False,
        is_encoder_decoder=False,
        num_experts=0,
        num_shared_experts=0,
        moe_every_n_layers=0,
        parallel_block_tied_norm=False,
        parallel_block=False,
        prenorm=False,
        rotary_emb_fraction=1.0,
        rotary_emb_interleaved=False,
        rotary_emb_scale_base=False,
        scale_attn_by_inverse_layer_idx=False,
        scale_attn_weights=True,
        use_rms_norm=False,
    )
    if config.get("rotary_scaling_factor") is not None:
        raise ModelError(
            f"config.json: `rotary_scaling_factor` is {config['rotary_scaling_factor']!r}, "
            "expected null: scaled positions make a vector depend on the batch's longest text",
            field="rotary_scaling_factor",
            allowed=["null"],
        )
    numbers = sizes(config, _NAMES)
    only(config, head_dim=numbers["hidden"] // numbers["num_heads"])
    biases: list[str] = []
    if flag(config, "qkv_proj_bias", default=False):
        biases += ["q", "k", "v", "projected"]
    if flag(config, "mlp_fc1_bias", default=False):
        biases += ["wide", "gate"]
    if flag(config, "mlp_fc2_bias", default=False):
        biases += ["narrow"]
    key = "activation_function" if "activation_function" in config else "hidden_act"
    return Architecture(
        **numbers,
        type_vocab_size=positive(config, "type_vocab_size"),
        learned_positions=False,
        rotary=(theta(config, 1000.0, "rotary_emb_base"),) * numbers["num_layers"],
        epsilon=epsilon(config, 1e-12, "layer_norm_eps", "layer_norm_epsilon"),
        gated=True,
        activation=activation(config, key, "silu", swiglu="silu", geglu="gelu"),
        biases=tuple(biases),
    )


_PUBLISHED = Layout(
    layers="encoder.layers.{}.",
    model={
        "embeddings.words": "embeddings.word_embeddings",
        "embeddings.types": "embeddings.token_type_embeddings",
        "embeddings.norm": "emb_ln",
    },
    layer={
        **fused("attn.Wqkv", "qkv"),
        "projected": "attn.out_proj",
        "attention.norm": "norm1",
        "wide": "mlp.fc11",
        "gate": "mlp.fc12",
        "narrow": "mlp.fc2",
        "norm": "norm2",
    },
)
_TRANSFORMERS = Layout(
    layers="layers.{}.",
    model={**_PUBLISHED.model, "embeddings.norm": "embeddings.LayerNorm"},
    layer={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "projected": "self_attn.o_proj",
        "attention.norm": "post_attention_layernorm",
        "wide": "mlp.up_proj",
        "gate": "mlp.gate_proj",
        "narrow": "mlp.down_proj",
        "norm": "post_mlp_layernorm",
    },
)

# `auto_map` names the code of the published checkpoints, whose graph transformers has as well.
_IGNORED = """
    auto_map dense_seq_output ffn_div fused_bias_fc fused_dropout_add_ln expert_choice_router
    max_trained_positions moe_impl moe_normalize_expert_weights moe_resid_pdrop moe_top_k
    pad_vocab_size_multiple reorder_and_upcast_attn router_aux_loss_coef summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj use_flash_attn
    use_xentropy
"""

NOMIC_BERT = Family(
    "nomic_bert",
    _read,
    ("nomic_bert.", "bert."),
    (_PUBLISHED, _TRANSFORMERS),
    frozenset(_IGNORED.split()),
)
