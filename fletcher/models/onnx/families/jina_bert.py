"""JinaBERT v2: BERT with a gated MLP, and with ALiBi instead of positions."""

from __future__ import annotations

from fletcher.models.checkpoint.config_json import (
    Config,
    activation,
    epsilon,
    only,
    positive,
    sizes,
)
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.families.bert import LAYOUT
from fletcher.models.onnx.families.family import Family, Layout, fused


def _read(config: Config) -> Architecture:
    only(
        config,
        position_embedding_type="alibi",
        is_causal=False,
        is_decoder=False,
        is_encoder_decoder=False,
        add_cross_attention=False,
        use_qk_norm=False,
    )
    return Architecture(
        **sizes(config),
        type_vocab_size=positive(config, "type_vocab_size"),
        learned_positions=False,
        distance_bias="alibi",
        epsilon=epsilon(config, 1e-12, "layer_norm_eps"),
        gated=True,
        # JinaBERT ignores `hidden_act` in its gated MLP.
        activation=activation(config, "feed_forward_type", "", geglu="gelu", reglu="relu"),
        biases=("q", "k", "v", "projected", "narrow"),
    )


JINA_BERT = Family(
    "jina_bert",
    _read,
    ("bert.",),
    (
        Layout(
            layers=LAYOUT.layers,
            model=LAYOUT.model,
            layer={
                **LAYOUT.layer,
                **fused("mlp.gated_layers", ("gate", "wide")),
                "narrow": "mlp.wo",
                "norm": "mlp.layernorm",
            },
        ),
    ),
    # `auto_map` names JinaBERT's code, which neither transformers nor sentence-transformers has.
    frozenset(("auto_map", "emb_pooler", "hidden_act")),
)
