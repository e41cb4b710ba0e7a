"""Embeddings of each layer's own: besides the stream, every block reads a small vector of each token (Gemma 3n).

Of a token with id t and embedding x, layer l reads ``(norm(W_l x / sqrt(width)) + sqrt(size) E_l[t]) / sqrt(2)``. The
tables are large and take no computation, so that they need not be where the layers are computed.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.layers.activations import ACTIVATIONS, Activation
from efficient_lm.models.layers.linear import Linear, scaled
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.parameters import ONES, Initialization, Normal, parameter
from efficient_lm.spec import Count, OneOf, Spec


class LayerEmbeddingSpec(Spec):
    """The tables in front of the layers.

    Attributes:
        size: of each layer's vector; blocks that read it state the same (see `LayerInputSpec`).
        vocab_size: rows of each layer's table; ids beyond them take row 0; null: the model's vocabulary.
        norm: of what is made of the embedding.
    """

    size: Count
    vocab_size: Count | None = None
    norm: OneOf[NormSpec] = RMSNormSpec()

    def build(
        self, width: int, layers: int, vocab_size: int, embedding_std: float, init: Initialization
    ) -> "LayerEmbedding":
        """The module for so many layers; `vocab_size` and `embedding_std` are the model's."""
        return LayerEmbedding(self, width, layers, self.vocab_size or vocab_size, embedding_std, init)

    def flops_per_token(self, width: int, layers: int) -> float:
        """Forward FLOPs for one token; reading the tables has none."""
        return 2.0 * width * layers * self.size


class LayerEmbedding(nnx.Module):
    def __init__(self, spec: LayerEmbeddingSpec, width: int, layers: int, rows: int, std: float, init: Initialization):
        self.rows, self.width, self.size = rows, width, spec.size
        own = {"layers": layers, "layer_embed": spec.size}
        self.tokens = parameter({"vocab": rows, **own}, Normal(std))
        self.projection = Linear({"embed": width}, own, init=init, batch=1)
        self.norm = spec.norm.build({"layer_embed": spec.size})

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """int32 `tokens [batch, time]`, embedded `x [batch, time, width]` → ``[layers, batch, time, size]``."""
        projected = self.norm(scaled(self.projection(x), self.width**-0.5))
        known = jnp.where(tokens < self.rows, tokens, 0)
        found = scaled(self.tokens[...][known].astype(x.dtype), math.sqrt(self.size))
        return jnp.moveaxis(scaled(projected + found, math.sqrt(0.5)), 2, 0)


class LayerInputSpec(Spec):
    """What a block does with its vector e, behind its halves: ``x + norm(V (activation(U x) * e))``.

    With several streams, the active one is read, and others are added to.

    Attributes:
        size: of the vector, as `model.layer_embedding` states it.
        activation: of the gate.
        scaled: whether a learned factor for each channel comes before U.
    """

    size: Count
    activation: Activation = "gelu_tanh"
    scaled: bool = False

    def build(self, width: int, norm: NormSpec, init: Initialization) -> "LayerInput":
        """The module; `norm` is the block's."""
        return LayerInput(self, width, norm, init)

    def flops_per_token(self, width: int) -> float:
        """Forward FLOPs for one token."""
        return 2.0 * 2 * width * self.size


class LayerInput(nnx.Module):
    def __init__(self, spec: LayerInputSpec, width: int, norm: NormSpec, init: Initialization):
        self.activation = ACTIVATIONS[spec.activation]
        self.scale = parameter({"embed": width}, ONES) if spec.scaled else None
        self.gate = Linear({"embed": width}, {"layer_embed": spec.size}, init=init)
        self.projection = Linear({"layer_embed": spec.size}, {"embed": width}, init=init, residual=True)
        self.norm = norm.build(width)

    def __call__(self, x: jax.Array, own: jax.Array) -> jax.Array:
        """What is added to the stream: `x [batch, time, width]`, `own [batch, time, size]` → as `x`."""
        x = x if self.scale is None else x * self.scale[...].astype(x.dtype)
        return self.norm(self.projection(self.activation(self.gate(x)) * own))
