"""Architectures of transformers, as choices by which their graphs are written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

# The linear layers of one transformer layer, as `encoder.Tensors` calls them.
LINEARS = ("q", "k", "v", "projected", "wide", "gate", "narrow")

# Buckets of learned biases by distance, as in T5 and MPNet.
NUM_BUCKETS = 32

# Fields that the weights' shapes imply, or that change no vector.
_NOT_IDENTITY = frozenset(
    ("vocab_size", "type_vocab_size", "hidden", "intermediate", "max_length", "pad_token_id")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """The computation of a layer on each token by itself.

    Attributes:
        epsilon: Epsilon of norms.
        activation: One of `encoder.ACTIVATIONS`.
        gated: The MLP multiplies `wide` by the activated `gate`; else it activates `wide`.
        norm_first: Norms precede attention and MLP, and one more follows the last layer; else norms
            follow the sums.
        rms_norm: Norms are RMS norms without a bias; else layer norms.
        norm_bias: Layer norms have a bias.
        biases: Those of LINEARS that have a bias.
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
    """A whole model; the defaults are BERT's.

    Attributes:
        vocab_size: Rows of the table of token embeddings.
        hidden: Width of hidden states.
        intermediate: Width inside the MLP.
        num_heads: Query heads.
        num_layers: Layers.
        max_length: Largest number of tokens that positions allow.
        pad_token_id: Id of the padding token.
        type_vocab_size: Rows of the table of token types; 0 without one.
        learned_positions: A table of positions is added to the token embeddings.
        position_offset: Row of the first token in that table.
        embedding_norm: A norm follows the sum of embeddings.
        num_kv_heads: Key and value heads, each shared by equally many query heads; 0: `num_heads`.
        head_dim: Width of a head; 0: `hidden` over `num_heads`.
        head_norm: An RMS norm is applied to each head of queries and keys.
        causal: A token attends only to itself and earlier tokens.
        rotary: Theta of rotary positions by layer; empty without rotary positions.
        windows: Tokens to each side that a token attends to, by layer, 0 for all; empty: all.
        distance_bias: Bias of scores by the distance of two tokens: `alibi`, slopes by head;
            `buckets`, learned for buckets of distances as in T5; empty for none.
        norm_of_first: With `norm_first`, the first layer has a norm before its attention.
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
        """Shape in a checkpoint of one of LINEARS, [rows, columns], or of a norm, [width]."""
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
        """Choices that change vectors but not weights; part of a model's hash.

        Choices at their default are left out, so that a new choice changes no existing hash.
        """
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _NOT_IDENTITY and getattr(self, field.name) != field.default
        }
