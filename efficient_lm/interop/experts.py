"""Mixtures of experts in published configs and tensors: what the families name alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from efficient_lm.errors import ConfigError
from efficient_lm.interop.description import Tensor, each, linear, table
from efficient_lm.interop.keys import ABSENT, Binding, Config, Draft, Inexpressible, Layers, count, key, listing
from efficient_lm.interop.placement import Pattern

MOE = {"ffn": {"kind": "moe"}}
"""A layer that has experts."""

FFN_KINDS = {"sparse": MOE, "dense": {}}
"""Kinds of layer, by whether they have experts."""

SOFTMAX = {"scores": "softmax", "normalize": True}
"""A router that shares a token among its experts by a softmax over those it chose."""

SIGMOID = {"scores": "sigmoid", "correction": True}
"""DeepSeek-V3's router, whose choice is corrected towards balance outside the gradient."""

CORRECTED = {"load_balance": 0.0, "correction_rate": 1e-3}
"""How DeepSeek-V3 was balanced (DeepSeek-AI 2024, section 4.2); no config says so."""

NOISE = ("router_jitter_noise",)
"""Rates of noise that training here does not add."""


@dataclass(frozen=True)
class Balanced:
    """`router_aux_loss_coef`, the weight of a loss that the reference adds only where `output_router_logits` is true.

    The reference takes it over all layers together, and counts a token once for each of its experts: a weight here is
    of the mean over `top_k`, and of the sum over layers.

    Attributes:
        default: the default weight.
        scope: the kind of layer that has experts.
    """

    default: float
    scope: str = "block"

    def read(self, config: Config, draft: Draft) -> None:
        stated = config.get("router_aux_loss_coef", self.default)
        draft.put(f"{self.scope}.ffn.balance.load_balance", stated if config.get("output_router_logits") else 0.0)

    def write(self, layers: Layers, config: Config) -> None:
        value = layers.get(f"{self.scope}.ffn.balance.load_balance")
        if value is not ABSENT:
            # Generation in the reference does not bear the loss.
            config |= {"router_aux_loss_coef": value or self.default, "output_router_logits": False}


def flag(stated: Any) -> Any:
    """A key that is true, false or null, which means false."""
    return False if stated is None else stated


def grouped(
    scope: str, groups: tuple[int, int], scale: float, others: Callable[[str], tuple[str, ...]] = lambda name: ()
) -> tuple[Binding, ...]:
    """Choice among groups of experts, with the defaults of a family.

    Args:
        groups: how many there are, and how many are chosen from.
        scale: factor of the chosen experts' weights.
        others: ``(name) -> further names`` of a key.
    """
    router = f"{scope}.ffn.router"
    return (
        key("n_group", f"{router}.groups", default=groups[0], others=others("n_group")),
        key("topk_group", f"{router}.top_groups", default=groups[1]),
        key("norm_topk_prob", f"{router}.normalize", default=True, to=flag, others=others("norm_topk_prob")),
        key("routed_scaling_factor", f"{router}.scale", default=scale),
    )


@dataclass(frozen=True)
class Shared:
    """A shared expert, which is as the others are but for its size; to be read after these.

    Attributes:
        name: key of its size.
        default: of that key.
        scope: the kind of layer that has it.
        units: whether the key counts hidden units, or experts whose units lie side by side.
        others: further names of the key (see `Key`).
        instead: key and default of the size that zero stands for, where no layer is without a shared expert.
    """

    name: str
    default: int
    scope: str
    units: bool = True
    others: tuple[str, ...] = ()
    instead: tuple[str, int] | None = None

    def read(self, config: Config, draft: Draft) -> None:
        size = config.get(next((name for name in self.others if name in config), self.name), self.default)
        if not isinstance(size, int) or size < 0:
            raise ConfigError(f"{self.name}: {size!r} is not a whole number")
        size = count(config, *self.instead) if self.instead and not size else size
        for values in draft.scoped(self.scope):
            expert = values["ffn"]["expert"]
            unit = 1 if self.units else expert["hidden"]
            if not isinstance(unit, int):
                raise ConfigError(f"{self.name}: counts experts, and their size is {unit!r}")
            hidden = size * unit
            values["ffn"]["shared"] = {**expert, "hidden": hidden} if hidden else None

    def write(self, layers: Layers, config: Config) -> None:
        hidden = layers.get(f"{self.scope}.ffn.shared.hidden")
        if hidden is ABSENT:
            return
        if self.instead and not hidden:
            raise Inexpressible(f"{self.scope}.ffn.shared", None)
        size, rest = divmod(hidden or 0, 1 if self.units else layers.get(f"{self.scope}.ffn.expert.hidden"))
        if rest:
            raise Inexpressible(f"{self.scope}.ffn.shared.hidden", hidden)
        config |= dict.fromkeys((self.name, *self.others), size)


def stepped(depth: int, number: int, others: tuple[str, ...] = (), word: int = 0) -> Pattern:
    """Qwen's placement: experts in every layer that `decoder_sparse_step` divides and `mlp_only_layers` leaves.

    Args:
        depth, number: defaults of ``num_hidden_layers`` and ``num_experts``.
        others: further names of ``num_experts``.
        word: as of `Pattern`.
    """

    def names(config: Config) -> list[str]:
        dense, step = listing(config, "mlp_only_layers"), count(config, "decoder_sparse_step", 1)
        experts = config.get(next((name for name in others if name in config), "num_experts"), number)
        layers = range(count(config, "num_hidden_layers", depth))
        return ["sparse" if experts and i not in dense and (i + 1) % step == 0 else "dense" for i in layers]

    def keys(ours: list[str]) -> Config:
        dense = [layer for layer, name in enumerate(ours) if name == "dense"]
        return {"num_hidden_layers": len(ours), "mlp_only_layers": dense, "decoder_sparse_step": 1}

    return Pattern(names, keys, word)


def router(theirs: str) -> tuple[Tensor, ...]:
    """A router's map, and the bias that corrects its choice."""
    ours = "ffn.inner.router"
    return (
        *linear(theirs, ours),
        *table(f"{theirs}.e_score_correction_bias", f"{ours}.correction"),
    )


def gated_experts(
    theirs: str, maps: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Tensor, ...]:
    """Gated experts, each published by itself; `theirs` has ``{}`` for its number."""
    ours, (gate, up, down) = "ffn.inner.experts", maps
    return each(
        *linear(f"{theirs}.{gate}", f"{ours}.gate_up", 0),
        *linear(f"{theirs}.{up}", f"{ours}.gate_up", 1),
        *linear(f"{theirs}.{down}", f"{ours}.down"),
    )
