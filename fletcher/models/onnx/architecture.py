"""Architectures of transformers: the choices that determine a model's graph."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

# Names in `encoder.Tensors` of the linear layers inside one transformer layer.
LINEARS = ("q", "k", "v", "projected", "wide", "gate", "narrow")

# Number of buckets of distances that have a learned bias each, as in T5 and MPNet.
NUM_BUCKETS = 32

# Fields that `identity` leaves out: the weights' shapes imply them, or they change no vector.
_NOT_IDENTITY = frozenset(
    ("vocab_size", "type_vocab_size", "hidden", "intermediate", "max_length", "pad_token_id")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """Choices for the parts of a layer that process each token separately.

    Attributes:
        epsilon: Epsilon of norms.
        activation: Activation function, one of `encoder.ACTIVATIONS`.
        gated: If true, the MLP multiplies `wide` by the activated `gate`. Otherwise it activates
            `wide`.
        norm_first: If true, norms precede attention and MLP, and a final norm follows the last
            layer. Otherwise norms follow the residual sums.
        rms_norm: If true, norms are RMS norms without a bias. Otherwise they are layer norms.
        norm_bias: Whether layer norms have a bias.
        biases: Names in LINEARS of the linear layers that have a bias.
    """

    epsilon: float
    activation: str
    gated: bool = False
    norm_first: bool = False
    rms_norm: bool = False
    norm_bias: bool = True
    biases: tuple[str, ...] = LINEARS


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture(Style):
    """Architecture of a complete model; the defaults are BERT's.

    Attributes:
        vocab_size: Number of rows in the table of token embeddings.
        hidden: Width of hidden states.
        intermediate: Width inside the MLP.
        num_heads: Number of query heads.
        num_layers: Number of layers.
        max_length: Largest number of tokens that the model has positions for.
        pad_token_id: Id of the padding token.
        type_vocab_size: Number of rows in the table of token types; 0 if the model has no such
            table.
        learned_positions: Whether a table of positions is added to the token embeddings.
        position_offset: Row of the table of positions that belongs to a text's first token.
        embedding_norm: Whether a norm follows the sum of embeddings.
        num_kv_heads: Number of key and value heads. Each is shared by the same number of query
            heads. 0 means `num_heads`.
        head_dim: Width of a head; 0 means `hidden` divided by `num_heads`.
        head_norm: Whether an RMS norm is applied to each head of queries and keys.
        causal: Whether a token attends only to itself and earlier tokens.
        rotary: Theta of rotary positions for each layer; empty if the model has no rotary
            positions.
        yarn: Scaling of rotary positions by YaRN (https://arxiv.org/abs/2309.00071): factor, number
            of positions before scaling, fast and slow number of rotations, factor of sines and
            cosines, and 1 for whole numbers as bounds. Empty if positions are not scaled.
        windows: For each layer, the number of tokens on each side that a token attends to; 0 means
            all tokens. Empty if all layers attend to all tokens.
        distance_bias: Bias added to attention scores, depending on the distance of two tokens.
            `alibi` is a slope for each head. `buckets` is a learned bias for each bucket of
            distances, as in T5. Empty for no bias.
        norm_of_first: With `norm_first`, whether the first layer has a norm before its attention.
    """

    vocab_size: int
    hidden: int
    intermediate: int
    num_heads: int
    num_layers: int
    max_length: int
    pad_token_id: int = 0
    type_vocab_size: int = 0
    learned_positions: bool = True
    position_offset: int = 0
    embedding_norm: bool = True
    num_kv_heads: int = 0
    head_dim: int = 0
    head_norm: bool = False
    causal: bool = False
    rotary: tuple[float, ...] = ()
    yarn: tuple[float, ...] = ()
    windows: tuple[int, ...] = ()
    distance_bias: Literal["", "alibi", "buckets"] = ""
    norm_of_first: bool = True

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a linear layer's weight, [rows, columns], or of a norm, [width].

        The shape is that in a checkpoint. `tensor` is one of LINEARS or the name of a norm.
        """
        queries, keys = self.num_heads * self.head_width, self.kv_heads * self.head_width
        shapes = {
            "q": (queries, self.hidden),
            "k": (keys, self.hidden),
            "v": (keys, self.hidden),
            "projected": (self.hidden, queries),
            "wide": (self.intermediate, self.hidden),
            "gate": (self.intermediate, self.hidden),
            "narrow": (self.hidden, self.intermediate),
            "q.norm": (self.head_width,),
            "k.norm": (self.head_width,),
        }
        return shapes.get(tensor, (self.hidden,))

    def identity(self) -> dict[str, Any]:
        """Fields that change vectors but not weights; they are part of a model's hash.

        Fields with their default value are left out. So adding a field to this class changes no
        existing hash.
        """
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _NOT_IDENTITY and getattr(self, field.name) != field.default
        }
