"""A language model: token embedding, stack of blocks, head."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field, model_validator

from efficient_lm.errors import ConfigError, nearest
from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.block import REMAT_NAMES, BlockSpec
from efficient_lm.models.context import Context
from efficient_lm.models.elastic import ElasticSpec, NumberingSpec
from efficient_lm.models.exits import Exits, ExitSpec, ExitStreams
from efficient_lm.models.layer_embedding import LayerEmbeddingSpec
from efficient_lm.models.layers.lookup import lookup
from efficient_lm.models.layers.norms import NormSpec, RMSNormSpec
from efficient_lm.models.mixers.base import MixerSpec
from efficient_lm.models.parameters import Blueprint, Initialization, Normal, Parameters, parameter
from efficient_lm.models.pregate import PregateSpec
from efficient_lm.models.sharing import sharing_faults
from efficient_lm.models.stack import Caches, Remat, Stack
from efficient_lm.spec import Count, Listing, OneOf, Positive, Spec

if TYPE_CHECKING:
    from efficient_lm.models.skipping.base import SkippingSpec


MOST_LAYERS = 4096
"""Each is described by itself before anything is built."""


class ModelSpec(Spec):
    """A whole architecture, written as a layout of blocks.

    Attributes:
        width: size of the residual stream.
        vocab_size: rows of the embedding; None takes the tokenizer's size.
        blocks: the kinds of block there are, by name.
        layout: names of blocks, in order.
        repeats: how many times the layout runs; layers = len(layout) * repeats.
        final_norm: before the head; null leaves it out.
        tied: whether the head uses the embedding's weights.
        embedding_multiplier: factor of the embedding; ``sqrt_width`` as in Gemma.
        pregate: a router in front of the layers, which mixtures of experts share; null has none.
        layer_embedding: embeddings that each layer has of its own, for blocks with a `layer_input`; null has none.
        learned_positions: rows of a table of learned absolute positions added to the embedding; null has none.
        logit_softcap: bounds the logits by ``softcap * tanh(logit / softcap)``.
        logit_multiplier: factor of the logits.
        exits: where tokens may leave early, and how that is trained; null has no exit but the head.
        elastic: what smaller models there are inside; null: none that are trained.
        numbering: of a model that has layers of another, the places they had there; null: layers go by their own.
        init_std: standard deviation of every matrix; null takes ``fan_in ** -0.5``.
        embedding_std: standard deviation of the embedding.
        remat, remat_names: what the backward pass recomputes (see `stack.checkpoint_policy`). ``dots`` ran fastest on
            a CPU, where writing and reading what ``none`` keeps costs more than computing it again.
        scan: False unrolls the layers.
    """

    width: Count
    blocks: Annotated[dict[str, BlockSpec], Field(min_length=1)]
    layout: Annotated[Listing[str], Field(min_length=1)]
    repeats: Count = 1
    vocab_size: Count | None = None
    pregate: PregateSpec | None = None
    final_norm: OneOf[NormSpec] | None = RMSNormSpec()
    tied: bool = False
    embedding_multiplier: Positive | Literal["sqrt_width"] = 1.0
    layer_embedding: LayerEmbeddingSpec | None = None
    learned_positions: Count | None = None
    logit_softcap: Positive | None = None
    logit_multiplier: Positive = 1.0
    exits: ExitSpec | None = None
    elastic: ElasticSpec | None = None
    numbering: NumberingSpec | None = None
    init_std: Positive | None = None
    embedding_std: Positive = 0.02
    remat: Remat = "dots"
    remat_names: Listing[Literal[REMAT_NAMES]] = ("attended", "ffn_hidden")
    scan: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> "ModelSpec":
        if len(self.layout) * self.repeats > MOST_LAYERS:
            raise ConfigError(
                f"model.repeats: {self.repeats} times {len(self.layout)} layers are more than {MOST_LAYERS}; "
                f"at most {MOST_LAYERS // len(self.layout)}"
            )
        for index, name in enumerate(self.layout):
            if name not in self.blocks:
                raise ConfigError(f"model.layout[{index}]: no block is named '{name}'; {nearest(name, self.blocks)}")
        for name in self.blocks:
            if name not in self.layout:
                raise ConfigError(f"model.blocks.{name}: the layout does not use this block: add it, or remove it")
        for name, layer in zip(self.layer_names(), self.layers(), strict=True):
            for key, message in layer.faults(self.width):
                raise ConfigError(f"model.blocks.{name}.{key}: {message}")
        self._check_pregate()
        self._check_around_layers()
        if self.exits is not None:
            for key, message in self.exits.faults(len(self.layer_names()), self.final_norm is not None):
                raise ConfigError(f"model.exits.{key}: {message}")
        return self

    def _check_pregate(self) -> None:
        """Whether the router in front of the layers works, is there if any block reads it, and fits those that do."""
        layers = zip(self.layer_names(), self.layers(), strict=True)
        readers = [(name, layer.ffn.pregated_experts) for name, layer in layers if layer.ffn is not None]
        readers = [(name, experts) for name, experts in readers if experts is not None]
        if self.pregate is None:
            for name, _ in readers:
                raise ConfigError(
                    f"model.blocks.{name}.ffn.router.pregated: the model has no router in front of its layers; "
                    "add model.pregate.experts, or set pregated to false"
                )
            return
        for key, message in self.pregate.faults(self.width):
            raise ConfigError(f"model.pregate.{key}: {message}")
        for name, experts in readers:
            if experts != self.pregate.experts:
                raise ConfigError(
                    f"model.pregate.experts: {self.pregate.experts}, but the ffn of model.blocks.{name} has {experts}"
                )
        if not readers:
            raise ConfigError("model.pregate: no block reads its scores; set ffn.router.pregated=true in one, or null")

    def _check_around_layers(self) -> None:
        """Whether what layers share, and what they are given from in front of them, is there and fits."""
        names, layers = self.layer_names(), self.layers()
        for number, key, message in sharing_faults(layers, self.width):
            raise ConfigError(f"model.blocks.{names[number]}.{key}: {message}")
        for name, layer in zip(names, layers, strict=True):
            if layer.streams != layers[0].streams:
                raise ConfigError(f"model.blocks.{name}.streams: all blocks have the same, and '{names[0]}' has others")
            if layer.layer_input is not None and self.layer_embedding is None:
                raise ConfigError(
                    f"model.blocks.{name}.layer_input: the model has no embeddings of each layer's own; "
                    f"add model.layer_embedding={{size: {layer.layer_input.size}}}"
                )
            if layer.layer_input is not None and layer.layer_input.size != self.layer_embedding.size:
                raise ConfigError(
                    f"model.layer_embedding.size: {self.layer_embedding.size}, but model.blocks.{name}.layer_input "
                    f"has {layer.layer_input.size}"
                )
        if self.layer_embedding is not None and not any(layer.layer_input for layer in layers):
            raise ConfigError("model.layer_embedding: no block reads it; give one a layer_input, or set it to null")
        if self.exits is not None and layers[0].streams is not None:
            raise ConfigError("model.exits: heads read one residual stream, and blocks have several; drop one of them")

    def layer_names(self) -> list[str]:
        """The block of each layer, by name."""
        return list(self.layout) * self.repeats

    def layers(self) -> list[BlockSpec]:
        """The spec of each layer, with values that vary with depth resolved."""
        names = self.layer_names()
        resolved = []
        for index, name in enumerate(names):
            try:
                resolved.append(self.blocks[name].at(names[:index].count(name), names.count(name)))
            except ConfigError as error:
                raise ConfigError(f"model.blocks.{name}: {error}") from None
        return resolved

    def decided(self, selection: str) -> "ModelSpec":
        """The same, with tokens of rows without a cache chosen as `selection` says by every depth rule of a block.

        Raises:
            ConfigError: no block has a rule that can choose so.
        """
        blocks = {
            name: block.model_copy(update={"depth": block.depth and block.depth.decided(selection)})
            for name, block in self.blocks.items()
        }
        if not any(block.depth and block.depth.chooses for block in blocks.values()):
            raise ConfigError("selection: no block of the model has a depth rule that chooses tokens; leave it out")
        return self.model_copy(update={"blocks": blocks})

    def check_causal(self, purpose: str) -> None:
        """Refuse mixers that see later tokens. Raises `ConfigError` naming one, and what they cannot be used for."""
        for name, block in self.blocks.items():
            if block.mixer is not None and block.mixer.bidirectional:
                causal = [kind for kind, found in MixerSpec.kinds.items() if not found.bidirectional]
                raise ConfigError(
                    f"model.blocks.{name}.mixer: '{block.mixer.kind}' is bidirectional, it sees the tokens that "
                    f"{purpose}; {nearest(block.mixer.kind, causal)}"
                )

    def check_decodes(self) -> None:
        """Refuse what cannot generate token by token. Raises `ConfigError` naming it."""
        self.check_causal("are still to be generated")
        for name, layer in zip(self.layer_names(), self.layers(), strict=True):
            for key, message in layer.ffn.decode_faults() if layer.ffn is not None else ():
                raise ConfigError(f"model.blocks.{name}.ffn.{key}: {message}")

    def build(self) -> "LanguageModel":
        """The model's definition; no array is allocated. `vocab_size` must be set."""
        return LanguageModel(self)


class Embedding(nnx.Module):
    """Token embedding, and learned absolute positions where the spec has them."""

    def __init__(self, spec: ModelSpec):
        start = Normal(spec.embedding_std)
        self.multiplier = (
            math.sqrt(spec.width) if spec.embedding_multiplier == "sqrt_width" else spec.embedding_multiplier
        )
        self.tokens = parameter({"vocab": spec.vocab_size, "embed": spec.width}, start)
        table = {"positions": spec.learned_positions, "embed": spec.width}
        self.positions = parameter(table, start) if spec.learned_positions else None

    def __call__(self, tokens: jax.Array, positions: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """int32 `tokens`, `positions` ``[batch, time]`` → ``[batch, time, width]``."""
        x = lookup(self.tokens[...], tokens, dtype)
        x = x if self.multiplier == 1.0 else x * jnp.asarray(self.multiplier, dtype)
        return x if self.positions is None else x + self.positions[...][positions].astype(dtype)


class Head(nnx.Module):
    """Final norm, and output weights unless they are the embedding's."""

    def __init__(self, spec: ModelSpec, init: Initialization):
        self.norm = spec.final_norm and spec.final_norm.build(spec.width)
        axes, start = {"embed": spec.width, "vocab": spec.vocab_size}, init.matrix(spec.width)
        self.weight = None if spec.tied else parameter(axes, start, decay=True, matrix=((0,), (1,)))


class LanguageModel:
    """A causal language model over plain parameters ``{"embedding", "stack", "head"}``.

    With a router in front of the layers there is ``pregate`` too, with exits that have parameters ``exits``, with
    embeddings of each layer's own ``layer_embedding``, and with several residual streams ``streams``.
    """

    def __init__(self, spec: ModelSpec):
        if spec.vocab_size is None:
            raise ConfigError("model.vocab_size: not set, and there is no tokenizer to take it from")
        layers = spec.layers()
        init = Initialization(spec.init_std, (2 * len(layers)) ** -0.5)
        self.spec, self.layers = spec, layers
        self.embedding = Blueprint(lambda: Embedding(spec))
        self.stack = Stack(layers, spec.width, init, spec.remat, spec.remat_names, spec.scan, spec.numbering)
        self.head = Blueprint(lambda: Head(spec, init))
        self.pregate = spec.pregate and Blueprint(lambda: spec.pregate.build(spec.width, init))
        self.exits = spec.exits and Exits(spec.exits, len(layers), spec.width, spec.final_norm, init)
        self.layer_embedding = spec.layer_embedding and Blueprint(
            lambda: spec.layer_embedding.build(spec.width, len(layers), spec.vocab_size, spec.embedding_std, init)
        )
        streams = layers[0].streams
        self.ends = streams and Blueprint(lambda: streams.build_ends(spec.width, init))

    def init(self, key: jax.Array) -> Parameters:
        """Fresh float32 parameters."""
        embedding, stack, head = jax.random.split(key, 3)
        params = {
            "embedding": self.embedding.init(embedding),
            "stack": self.stack.init(stack),
            "head": self.head.init(head),
        }
        for purpose, (name, part) in enumerate(self._others.items(), start=3):
            if part and part.declarations:
                params[name] = part.init(jax.random.fold_in(key, purpose))
        return params

    @property
    def _others(self) -> dict[str, Any]:
        """Parts that not every model has, by the name of their parameters."""
        return {
            "pregate": self.pregate, "exits": self.exits, "layer_embedding": self.layer_embedding, "streams": self.ends,
        }  # fmt: skip

    @property
    def declarations(self) -> Parameters:
        """What each parameter declares of itself, in the shape of the parameters."""
        declarations = {
            "embedding": self.embedding.declarations,
            "stack": self.stack.declarations,
            "head": self.head.declarations,
        }
        others = {name: part.declarations for name, part in self._others.items() if part}
        return declarations | {name: declared for name, declared in others.items() if declared}

    def hidden(
        self,
        params: Parameters,
        tokens: jax.Array,
        context: Context | None = None,
        caches: Caches | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        skipping: "SkippingSpec | None" = None,
    ) -> tuple[jax.Array, Caches | None, Auxiliary]:
        """What the head reads, after the final norm.

        Args:
            tokens: int32 ``[batch, time]``.
            context: positions and documents; None takes each row as one whole document.
            caches: from `init_caches` or an earlier call; None keeps nothing.
            dtype: of the computation; parameters stay float32.
            skipping: which layers each token runs; None runs all. `Stack.ran` says which they were.

        Returns:
            `[batch, time, width]` in `dtype`, the caches with these tokens added, and auxiliaries as of `Stack`.

        Raises:
            ConfigError: a policy that cannot work with the model.
        """
        x, context, entered = self.entered(params, tokens, context, caches, dtype)
        if skipping is not None:
            skipping.check(self)
        whole = skipping is None or (context.mode == "prefill" and not skipping.prompt)
        traversal = None if whole else skipping.traversal(self, params)
        x, caches, auxiliary, state = self.stack(params["stack"], x, context, caches, traversal)
        caches = caches if caches is None else caches | entered
        hidden = self.normed(params, x)
        return hidden if traversal is None else traversal.result(state, hidden), caches, auxiliary

    def hidden_with_exits(
        self,
        params: Parameters,
        tokens: jax.Array,
        context: Context | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> tuple[jax.Array, ExitStreams, Auxiliary]:
        """As `hidden` without caches, and the streams at every exit of the model, which must have some."""
        x, context, _ = self.entered(params, tokens, context, None, dtype)
        collect = self.exits.collector(params)
        x, _, auxiliary, state = self.stack(params["stack"], x, context, None, collect)
        return self.normed(params, x), collect.streams(state, x), auxiliary

    def normed(self, params: Parameters, x: jax.Array) -> jax.Array:
        """The residual stream `x [..., width]`, or streams, behind the final norm."""
        x = x if self.ends is None else self.ends(params.get("streams", {})).joined(x)
        norm = self.head(params["head"]).norm
        return x if norm is None else norm(x)

    def entered(
        self,
        params: Parameters,
        tokens: jax.Array,
        context: Context | None = None,
        caches: Caches | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> tuple[jax.Array, Context, Caches]:
        """What the first layer reads, what layers are told, and caches of what came before; arguments as `hidden`."""
        context = context or Context.rows(*tokens.shape)
        x, entered = self.embedding(params["embedding"])(tokens, context.positions, dtype), {}
        if self.pregate is not None:
            cache = None if caches is None else caches["pregate"]
            scores, cache = self.pregate(params["pregate"])(x, context, cache)
            context, entered = replace(context, pregated=scores), {"pregate": cache}
        if self.layer_embedding is not None:
            inputs = self.layer_embedding(params["layer_embedding"])(tokens, x)
            context = replace(context, layer_inputs=inputs)
        x = x if self.ends is None else self.ends(params.get("streams", {})).split(x)
        return x, context, entered

    def corrected(self, params: Parameters, counts: dict[str, Any]) -> Parameters:
        """The parameters after an optimizer step, moved by what the step's tokens were counted to do.

        `counts` is the part of `Auxiliary.observed` that `efficient_lm.models.auxiliary.counts` keeps.
        """
        return params | {"stack": self.stack.corrected(params["stack"], counts)} if counts else params

    def head_weight(self, params: Parameters) -> jax.Array:
        """Output weights, float32 ``[width, vocab]``."""
        weight = params["embedding"]["tokens"].T if self.spec.tied else params["head"]["weight"]
        return weight if self.spec.logit_multiplier == 1.0 else weight * self.spec.logit_multiplier

    def logits_from(self, params: Parameters, hidden: jax.Array) -> jax.Array:
        """float32 ``[..., vocab]`` from `hidden [..., width]`."""
        weight = self.head_weight(params).astype(hidden.dtype)
        logits = jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def logits(self, params: Parameters, tokens: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """float32 ``[batch, time, vocab]``; arguments as `hidden`."""
        return self.logits_from(params, self.hidden(params, tokens, *args, **options)[0])

    def init_caches(self, batch: int, length: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Caches:
        """Empty caches for `batch` sequences of up to `length` tokens."""
        caches = self.stack.init_caches(batch, length, dtype)
        if self.pregate is None:
            return caches
        empty = self.pregate(jax.tree.map(lambda d: None, self.pregate.declarations))
        return caches | {"pregate": empty.init_cache(batch, length, dtype)}

    def check_length(self, length: int, key: str) -> None:
        """Refuse sequences longer than the table of learned positions. Raises `ConfigError` naming `key`."""
        table = self.spec.learned_positions
        if table is not None and length > table:
            raise ConfigError(f"{key}: {length} tokens, but model.learned_positions holds {table}; at most {table}")

    def flops_per_token(self, context_length: int) -> float:
        """Forward FLOPs for one token, the head included and the embedding not."""
        layers = sum(layer.flops_per_token(self.spec.width, context_length) for layer in self.layers)
        return layers + self.flops_around_layers(context_length)

    def flops_around_layers(self, context_length: float) -> float:
        """Of those of `flops_per_token` what is in front of the layers and behind them."""
        spec, width = self.spec, self.spec.width
        flops = spec.pregate.flops_per_token(width, context_length) if spec.pregate else 0.0
        flops += spec.layer_embedding.flops_per_token(width, len(self.layers)) if spec.layer_embedding else 0.0
        flops += self.layers[0].streams.flops_of_ends(width) if self.ends else 0.0
        return flops + 2.0 * width * spec.vocab_size

    def training_flops_per_token(self, context_length: int) -> float:
        """FLOPs for one token of a training step: three times those of the forward pass, exits included."""
        exits = self.exits.flops_per_token(self.spec.vocab_size) if self.exits else 0.0
        return 3.0 * (self.flops_per_token(context_length) + exits)
