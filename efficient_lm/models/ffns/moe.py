"""Mixture of experts: each token goes through a few of many channel mixers."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.errors import nearest
from efficient_lm.models.auxiliary import Auxiliary
from efficient_lm.models.context import Context
from efficient_lm.models.elastic import LAID_ALONG, Elastic
from efficient_lm.models.ffns import expert_parallel
from efficient_lm.models.ffns.base import FFNSpec
from efficient_lm.models.ffns.dense import DenseSpec, SwiGLUSpec
from efficient_lm.models.ffns.experts import balance, dispatch
from efficient_lm.models.ffns.experts.balance import BalanceSpec
from efficient_lm.models.ffns.experts.dispatch import DispatchSpec
from efficient_lm.models.ffns.experts.expert_choice import chosen
from efficient_lm.models.ffns.experts.router import Router, RouterSpec
from efficient_lm.models.ffns.experts.zero import ZeroExperts, ZeroExpertsSpec
from efficient_lm.models.layers.groups import Groups
from efficient_lm.models.layers.linear import Linear
from efficient_lm.models.parameters import Initialization, Parameters
from efficient_lm.spec import Count, OneOf, PerLayer


class MoESpec(FFNSpec):
    """``y = sum over the token's experts of weight * expert(x)``, and what is shared (Shazeer et al. 2017, eq. 1).

    Fine-grained experts (DeepSeekMoE, Dai et al. 2024) are many with a small `expert.hidden`. A residual mixture
    (PR-MoE, Rajbhandari et al. 2022, section 4.1) is `top_k` 1 with `shared`; a pyramid lists `experts` by layer.

    Attributes:
        experts: how many there are.
        top_k: how many a token takes; with ``choice: expert``, on average.
        expert: what each is, any dense kind.
        shared: a dense channel mixer that every token takes besides; null: none.
        shared_gate: whether its result is multiplied by ``sigmoid(x w)`` (Qwen1.5-MoE).
        router: how tokens and experts are scored.
        balance: losses on the routing.
        dispatch: how many tokens an expert takes.
        choice: whether each ``token`` chooses its best experts or each ``expert`` its best tokens; the latter sees
            later tokens, and has no decode.
        zero_experts: experts that compute next to nothing, for routers to choose besides; null: none.
        latent: size of what experts read and write, between a map down before routing and one up behind the weighted
            sum, while router and `shared` keep to the width (Nemotron 3, NVIDIA 2025); null: the width, without maps.
        latent_bias: whether these maps have biases.
    """

    kind: Literal["moe"] = "moe"
    experts: PerLayer[Count] = 8
    top_k: PerLayer[Count] = 2
    expert: OneOf[FFNSpec] = SwiGLUSpec()
    shared: OneOf[FFNSpec] | None = None
    shared_gate: bool = False
    router: RouterSpec = RouterSpec()
    balance: BalanceSpec = BalanceSpec()
    dispatch: DispatchSpec = DispatchSpec()
    choice: Literal["token", "expert"] = "token"
    zero_experts: ZeroExpertsSpec | None = None
    latent: Count | None = None
    latent_bias: bool = False

    @property
    def routed(self) -> int:
        """Experts that a router chooses from, those that compute nothing included."""
        return self.experts + (self.zero_experts.count if self.zero_experts else 0)

    @property
    def load(self) -> float:
        """Part of all routes that an expert is to have."""
        return self.zero_experts.load(self.experts) if self.zero_experts else 1.0 / self.experts

    @property
    def pregated_experts(self) -> int | None:
        return self.routed if self.router.pregated else None

    def faults(self, width: int) -> Iterator[tuple[str, str]]:
        dense = [kind for kind, found in FFNSpec.kinds.items() if issubclass(found, DenseSpec)]
        for name, part in (("expert", self.expert), ("shared", self.shared)):
            if part is not None and not isinstance(part, DenseSpec):
                yield f"{name}.kind", f"'{part.kind}' is not a dense channel mixer; {nearest(part.kind, dense)}"
            elif part is not None:
                size = width if name == "shared" else self.latent or width
                yield from ((f"{name}.{key}", message) for key, message in part.faults(size))
        if self.top_k > self.routed:
            yield "top_k", f"{self.top_k}, but there are {self.routed} experts; at most {self.routed}"
        else:
            yield from ((f"router.{key}", message) for key, message in self.router.faults(self.routed, self.top_k))
        if self.shared_gate and self.shared is None:
            yield "shared_gate", "there is nothing shared to gate: set shared, or shared_gate to false"
        if self.balance.correction_rate and not self.router.correction:
            yield "balance.correction_rate", "there is no correction to move: set router.correction, or the rate to 0"
        if self.choice == "expert":
            yield from self._expert_choice_faults()

    def _expert_choice_faults(self) -> Iterator[tuple[str, str]]:
        unused = [
            ("balance.load_balance", self.balance.load_balance, "loads are equal", 0),
            ("router.correction", self.router.correction, "loads are equal", "false"),
            ("router.normalize", self.router.normalize, "a token may have no expert", "false"),
            ("router.groups", self.router.groups > 1, "tokens do not choose", 1),
            ("zero_experts", self.zero_experts, "they take as many tokens as the others", "null"),
        ]
        for key, given, why, valid in unused:
            if given:
                yield key, f"with choice: expert, {why}; the only value is {valid}"
        factor = self.dispatch.capacity_factor or 1.0
        if factor * self.top_k > self.experts:
            most = self.experts / self.top_k
            yield (
                "dispatch.capacity_factor",
                f"{factor:g}: an expert would take more tokens than there are; at most {most:g} with "
                f"top_k={self.top_k} of {self.experts} experts",
            )

    def decode_faults(self) -> Iterator[tuple[str, str]]:
        if self.choice == "expert":
            yield "choice", "with 'expert', what a token gets depends on tokens still to be generated; valid: 'token'"

    def resolved(self, width: int) -> "MoESpec":
        shared = self.shared and self.shared.resolved(width)
        return self.model_copy(update={"expert": self.expert.resolved(self.latent or width), "shared": shared})

    def axis_sizes(self) -> dict[str, int]:
        """Of routed experts, and of hidden units that they and what is shared can both be cut by.

        Experts that are chosen by groups cannot be fewer, for groups would no longer be equal.
        """
        sizes = [part.axis_sizes()["ffn"] for part in (self.expert, self.shared) if part is not None]
        fixed = self.router.groups > 1 or self.router.pregated or self.zero_experts
        return {"ffn": math.gcd(*sizes)} | ({} if fixed else {"experts": self.experts})

    def laid_along(self) -> dict[str, tuple[str, ...]]:
        return {"experts": LAID_ALONG["experts"]} if "experts" in self.axis_sizes() else {}

    def inside(self) -> dict[str, Elastic]:
        return {"experts": self.expert} | ({} if self.shared is None else {"shared": self.shared})

    def cut(self, units: Mapping[str, int]) -> "MoESpec":
        changes: dict[str, Any] = {}
        if "ffn" in units:
            whole = self.axis_sizes()["ffn"]
            for name in ("expert", "shared"):
                part = getattr(self, name)
                changes[name] = part and part.cut({"ffn": part.axis_sizes()["ffn"] * units["ffn"] // whole})
        if "experts" in units and "experts" in self.axis_sizes():
            changes["experts"] = units["experts"]
        return self.model_copy(update=changes)

    def build(self, width: int, init: Initialization) -> nnx.Module:
        return MoE(self, width, init)

    def corrected(self, params: Parameters, counts: dict[str, jax.Array]) -> Parameters:
        if not self.balance.correction_rate:
            return params
        router = params["router"]
        moved = balance.corrected(router["correction"], counts["expert_load"], self.balance.correction_rate)
        return params | {"router": router | {"correction": moved}}

    def flops_per_token(self, width: int) -> float:
        """Of the rows that experts are given: empty ones within a capacity count, and padding of tiles does not.

        Dropless tokens are supposed to go to experts that compute as often as `load` says.
        """
        factor = self.dispatch.capacity_factor or 1.0
        each = self.expert.flops_per_token(self.latent or width)
        experts = factor * self.top_k * self.load * self.experts * each
        shared = self.shared.flops_per_token(width) if self.shared else 0.0
        columns = (0 if self.router.pregated else self.routed) + self.shared_gate
        columns += 3 * self.zero_experts.constants if self.zero_experts else 0
        columns += 2 * (self.latent or 0)
        return experts + shared + 2.0 * width * columns


class MoE(nnx.Module):
    def __init__(self, spec: MoESpec, width: int, init: Initialization):
        zero, inner = spec.zero_experts, spec.latent or width
        embed, latent = {"embed": width}, {"latent": inner}
        self.spec = spec
        self.router = Router(spec.router, width, spec.routed, init)
        self.experts = spec.expert.build(inner, init, spec.experts)
        self.zero_experts = ZeroExperts(zero, inner, init) if zero else None
        bias = spec.latent_bias
        self.latent_down = Linear(embed, latent, init=init, bias=bias) if spec.latent else None
        self.latent_up = Linear(latent, embed, init=init, bias=bias, residual=True) if spec.latent else None
        self.shared = spec.shared and spec.shared.build(width, init)
        self.shared_gate = Linear(embed, {"gate": 1}, init=init) if spec.shared_gate else None

    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, Auxiliary]:
        """`x [batch, time, width]` → the same shape and dtype, and what routing cost and was seen to do.

        Losses: ``load_balance``, ``router_z``. Observed: ``router_entropy``, ``load_imbalance``, ``expert_load
        [experts]`` (see `balance.observed`); where tokens can be dropped, what `balance.drops` says of them; and with
        ``context.record`` of each token ``routes``, ``route_weights`` and ``dropped``.
        """
        logits = self.router(x, context)
        scores = self.router.scores(logits)
        route = self._tokens_choose if self.spec.choice == "token" else self._experts_choose
        inner = x if self.latent_down is None else self.latent_down(x)
        y, routes, weights, dropped = route(inner, scores, context)
        if self.latent_up is not None:
            y = self.latent_up(y.astype(x.dtype)).astype(jnp.float32)
        if self.shared is not None:
            y = y + self._shared(x, context)
        y = jnp.where((context.segment_ids != 0)[..., None], y, 0.0).astype(x.dtype)
        return y, Auxiliary(
            self._losses(logits, scores, routes, context), self._observed(scores, routes, weights, dropped, context)
        )

    def _shared(self, x: jax.Array, context: Context) -> jax.Array:
        y = self.shared(x, context)[0].astype(jnp.float32)
        return y if self.shared_gate is None else y * jax.nn.sigmoid(self.shared_gate(x).astype(jnp.float32))

    def _tokens_choose(
        self, x: jax.Array, scores: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """float32 result, routes (-1 for padding), float32 weights, and which routes were dropped."""
        spec, live = self.spec, (context.segment_ids != 0)[..., None]
        routes, weights = self.router.choice(scores, spec.top_k)
        routes, weights = jnp.where(live, routes, -1), jnp.where(live, weights, 0.0)
        dropped = jnp.zeros(routes.shape, bool)
        if spec.dispatch.capacity_factor is None:
            done = self._through(x, routes, None)
        else:
            places = self._places(x)
            waiting = partial(dispatch.waiting, experts=spec.experts, over=spec.dispatch.over)
            ahead = expert_parallel.by_rows(waiting, routes) if spec.dispatch.over == "sequence" else waiting(routes)
            dropped = (routes >= 0) & (routes < spec.experts) & (ahead >= places)
            plan = dispatch.bounded(routes, ahead, spec.experts, places, spec.dispatch.over)
            done = self._through(x, jnp.where(dropped, -1, routes), plan)
        y = jnp.sum(done.astype(jnp.float32) * weights[..., None], axis=2)
        if self.zero_experts is not None:
            y = y + self.zero_experts(x, routes, weights, spec.experts)
        return y, routes, weights, dropped

    def _through(self, x: jax.Array, routes: jax.Array, plan: dispatch.Plan | None) -> jax.Array:
        """Every token through each of its experts, by the plan or else dropless → ``[batch, time, k, width]``."""
        experts = self.spec.experts
        if expert_parallel.divided(*x.shape[:2]):
            graph, params = nnx.split(self.experts)
            if not self.spec.expert.ternary:
                # Rounded before they are gathered, as they are after.
                params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)

            def compute(params: Any, rows: jax.Array, sizes: jax.Array) -> jax.Array:
                return nnx.merge(graph, params).transformed(rows, Groups(sizes))

            here = jnp.where(routes < experts, routes, -1)
            return expert_parallel.routed(compute, params, x, here, experts)
        plan = plan or dispatch.dropless(routes, experts)
        return plan(self.experts.transformed, x.reshape(-1, x.shape[-1])).reshape(*routes.shape, -1)

    def _experts_choose(
        self, x: jax.Array, scores: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """As `_tokens_choose`, with a route for every expert; a token is dropped that none takes."""
        live = context.segment_ids != 0
        found = chosen(scores, live, self._places(x), self.spec.dispatch.over)
        found = found._replace(weights=found.weights * self.spec.router.scale)
        y = found(self.experts.transformed, x.reshape(-1, x.shape[-1])).reshape(x.shape)
        routes = found.routes(*live.shape)
        weights = jnp.where(routes < 0, 0.0, scores * self.spec.router.scale)
        left = live & jnp.all(routes < 0, axis=-1)
        return y, routes, weights, jnp.broadcast_to(left[..., None], routes.shape)

    def _places(self, x: jax.Array) -> int:
        """Rows that an expert has for each row of the batch, or for all."""
        spec, (batch, time) = self.spec, x.shape[:2]
        tokens = time if spec.dispatch.over == "sequence" else batch * time
        return dispatch.capacity(spec.dispatch.capacity_factor or 1.0, spec.top_k, tokens, spec.load)

    def _losses(
        self, logits: jax.Array, scores: jax.Array, routes: jax.Array, context: Context
    ) -> dict[str, jax.Array]:
        spec, losses = self.spec.balance, {}
        if spec.load_balance:
            taken = balance.selected(routes, self.spec.routed)
            weights = self.zero_experts and self.zero_experts.spec.weights(self.spec.experts)
            losses["load_balance"] = spec.load_balance * balance.load_balance(spec, scores, taken, context, weights)
        if spec.router_z:
            losses["router_z"] = spec.router_z * balance.router_z(logits, context)
        return losses

    def _observed(
        self, scores: jax.Array, routes: jax.Array, weights: jax.Array, dropped: jax.Array, context: Context
    ) -> dict[str, Any]:
        scores, weights = jax.lax.stop_gradient((scores, weights))
        taken = balance.selected(routes, self.spec.routed)
        found = balance.observed(scores, taken, context, self.spec.experts)
        if self.spec.choice == "expert":
            live = (context.segment_ids != 0)[..., None]
            found |= balance.drops(dropped[..., :1], jnp.where(live, 0, -1))
        elif self.spec.dispatch.capacity_factor is not None:
            found |= balance.drops(dropped, routes)
        if context.record:
            found |= {"routes": routes, "route_weights": weights, "dropped": dropped}
        return found
