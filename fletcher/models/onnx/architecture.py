"""What a transformer computes, in named choices: all that a graph's writer asks of a family."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

# The linear layers of one transformer layer, as `encoder.Tensors` calls them.
LINEARS = ("q", "k", "v", "projected", "wide", "gate", "narrow")

# Of learned biases by distance, as T5 and MPNet have them.
NUM_BUCKETS = 32

# What shapes of weights say anyway, and what has no part in a vector.
_NOT_IDENTITY = frozenset(
    ("vocab_size", "type_vocab_size", "hidden", "intermediate", "max_length", "pad_token_id")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What a layer does to each token alone.

    Attributes:
        epsilon: Of norms.
        activation: One of `encoder.ACTIVATIONS`.
        gated: The MLP multiplies `wide` by the activated `gate`; else `wide` itself is activated.
        norm_first: Norms stand before attention and MLP, and one more after the last layer; else
            they stand after the sums.
        rms_norm: Norms divide by the root of the mean square, and have no bias; else layer norms.
        norm_bias: Layer norms have a bias.
        biases: Which of LINEARS have a bias.
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
    """A whole model; with every default it is BERT.

    Attributes:
        vocab_size: Rows of the table of token embeddings.
        hidden: Width of hidden states.
        intermediate: Width inside the MLP.
        num_heads: Heads of queries.
        num_layers: Layers.
        max_length: Tokens that the positions suffice for.
        pad_token_id: The padding token.
        type_vocab_size: Rows of the table of token types; 0: there is none.
        learned_positions: A table of positions is added to the token embeddings.
        position_offset: The row of that table which is the first token's.
        embedding_norm: The sum of embeddings is normalised.
        num_kv_heads: Heads of keys and values, each shared by as many heads of queries; 0: as many
            as these.
        head_dim: Width of a head; 0: `hidden` over `num_heads`.
        head_norm: Queries and keys are normalised head by head, as the RMS norm does.
        causal: A token sees itself and those before it only.
        rotary: Theta of rotary positions by layer; empty: none.
        windows: Tokens that a token sees to each side, by layer, 0 for all; empty: all.
        distance_bias: What is added to scores by the distance of two tokens: `alibi`, slopes by
            head, or `buckets`, learned for buckets of distances as in T5.
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
        """Elements of one head."""
        return self.head_dim or self.hidden // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    def shape(self, tensor: str) -> tuple[int, ...]:
        """[rows, columns] of a checkpoint's tensor of a layer, or [width] of a norm's.

        Args:
            tensor: One of LINEARS, or the name of a norm.
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
        """What vectors depend on and weights do not show; part of a model's hash.

        Choices left at their default do not count, so that a new one changes no model's hash.
        """
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _NOT_IDENTITY and getattr(self, field.name) != field.default
        }
