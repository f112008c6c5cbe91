"""DistilBERT: BERT without token types and with other tensor names."""

from __future__ import annotations

from fletcher.models.checkpoint.config_json import Config, activation, only, sizes
from fletcher.models.onnx.architecture import Architecture
from fletcher.models.onnx.families.bert import LAYOUT
from fletcher.models.onnx.families.family import Family, Layout

_NAMES = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
}


def _read(config: Config) -> Architecture:
    only(config, is_causal=False, is_decoder=False, is_encoder_decoder=False)
    return Architecture(
        **sizes(config, _NAMES), epsilon=1e-12, activation=activation(config, "activation", "gelu")
    )


DISTILBERT = Family(
    "distilbert",
    _read,
    ("distilbert.",),
    (
        Layout(
            layers="transformer.layer.{}.",
            model=LAYOUT.model,
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
    # Sinusoidal positions are in the checkpoint as a table, too.
    frozenset(("sinusoidal_pos_embds", "tie_weights_")),
)
