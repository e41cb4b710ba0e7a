"""Who goes where: groups of experts, capacities, experts that choose, experts that compute nothing, and balance."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.models.context import Context
from efficient_lm.models.ffns.experts import balance
from efficient_lm.models.ffns.experts.balance import BalanceSpec
from efficient_lm.models.ffns.experts.router import Router, RouterSpec
from efficient_lm.models.ffns.moe import MoESpec
from efficient_lm.models.parameters import Blueprint, Initialization

WIDTH, BATCH, TIME, EXPERTS = 8, 2, 16, 4
SEGMENTS = np.ones((BATCH, TIME), np.int32)
SEGMENTS[0, 5:], SEGMENTS[1, 13:] = 2, 0
LIVE = SEGMENTS != 0
CONTEXT = Context(jnp.zeros((BATCH, TIME), jnp.int32), jnp.asarray(SEGMENTS), record=True)


class Mixture:
    """A mixture of experts with its input, result and what was seen; `expert(e)` is what expert e makes of x."""

    def __init__(self, drawn, lean=0.0, **options):
        router = {"bias": True, **options.pop("router", {})}
        values = {
            "kind": "moe",
            "experts": EXPERTS,
            "expert": {"kind": "mlp", "hidden": 6},
            "router": router,
            **options,
        }
        self.spec = MoESpec.model_validate(values)
        assert not list(self.spec.faults(WIDTH))
        self.blueprint = Blueprint(lambda: self.spec.build(WIDTH, Initialization()))
        self.params = drawn(self.blueprint)
        bias = lean * jnp.arange(self.spec.routed, dtype=jnp.float32)
        self.params["router"]["bias"] = bias
        self.x = jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH))
        y, auxiliary = jax.jit(lambda params, x: self.blueprint(params)(x, CONTEXT))(self.params, self.x)
        self.y, self.losses = np.asarray(y), auxiliary.losses
        self.seen = {name: np.asarray(value) for name, value in auxiliary.observed.items()}
        logits = np.asarray(self.x @ self.params["router"]["weight"] + bias, np.float64)
        self.scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    def expert(self, number):
        experts = jax.tree.map(lambda leaf: leaf[number], self.params["experts"])
        return np.asarray(jax.nn.gelu(self.x @ experts["up"]["weight"], approximate=False) @ experts["down"]["weight"])

    def weighted(self, weights):
        """The sum over experts with `weights [batch, time, experts]`."""
        return sum(weights[..., number, None] * self.expert(number) for number in range(EXPERTS))


@pytest.fixture
def mixture_of(drawn):
    """``mixture_of(lean=0.0, **options)`` → `Mixture`."""
    return functools.partial(Mixture, drawn)


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, atol=3e-6 * np.abs(wanted).max(), rtol=1e-4)


@pytest.mark.parametrize("group_score", ["best", "best_two"])
def test_a_token_takes_its_experts_from_its_best_groups(group_score, drawn):
    spec = RouterSpec(scores="sigmoid", correction=True, groups=4, top_groups=2, group_score=group_score)
    router = Blueprint(lambda: Router(spec, WIDTH, 12, Initialization()))
    params = drawn(router) | {"correction": 0.3 * jax.random.normal(jax.random.key(1), (12,))}
    scores = jax.nn.sigmoid(jax.random.normal(jax.random.key(2), (1, 40, 12)))
    routes, weights = router(params).choice(scores, 3)
    ranking = np.asarray(scores + params["correction"])[0]
    for token, (chosen, ranks) in enumerate(zip(np.asarray(routes)[0], ranking, strict=True)):
        best = np.sort(ranks.reshape(4, 3), axis=1)[:, -1 if group_score == "best" else -2 :].sum(1)
        held = np.concatenate([np.arange(3 * group, 3 * group + 3) for group in np.argsort(-best)[:2]])
        assert list(chosen) == list(held[np.argsort(-ranks[held])[:3]])
        np.testing.assert_array_equal(weights[0, token], scores[0, token, chosen])


@pytest.mark.parametrize("over", ["sequence", "batch"])
def test_a_capacity_drops_exactly_the_routes_it_says(over, mixture_of):
    mixture = mixture_of(lean=0.7, top_k=2, dispatch={"capacity_factor": 0.8, "over": over})
    places = math.ceil(0.8 * 2 * (TIME if over == "sequence" else BATCH * TIME) / EXPERTS)
    routes = np.where(LIVE[..., None], np.argsort(-mixture.scores, axis=-1)[..., :2], -1)
    dropped, taken = np.zeros(routes.shape, bool), {}
    for choice in range(2):
        for position in range(TIME):
            for row in np.flatnonzero(LIVE[:, position]):
                queue = (routes[row, position, choice], row if over == "sequence" else 0)
                dropped[row, position, choice] = taken.setdefault(queue, 0) >= places
                taken[queue] += 1
    assert 0 < dropped[..., 0].sum() < dropped.sum()
    np.testing.assert_array_equal(mixture.seen["routes"], routes)
    np.testing.assert_array_equal(mixture.seen["dropped"], dropped)
    weights = np.zeros(mixture.scores.shape)
    kept = np.where(dropped | ~LIVE[..., None], 0.0, np.take_along_axis(mixture.scores, np.maximum(routes, 0), -1))
    np.put_along_axis(weights, np.maximum(routes, 0), kept, -1)
    close(mixture.y, mixture.weighted(weights))
    assert mixture.seen["dropped_share"] == pytest.approx(dropped.sum() / (2 * LIVE.sum()))
    eighths = dropped.reshape(BATCH, 8, -1).sum((0, 2))
    np.testing.assert_array_equal(mixture.seen["dropped_by_position"], eighths)
    assert eighths[4:].sum() > eighths[:4].sum(), "drops come towards the end"
    np.testing.assert_array_equal(mixture.seen["routed_by_position"], 2 * LIVE.reshape(BATCH, 8, -1).sum((0, 2)))


def test_a_capacity_that_suffices_drops_nothing(mixture_of):
    dropless, bounded = mixture_of(), mixture_of(dispatch={"capacity_factor": EXPERTS / 2})
    close(bounded.y, dropless.y)
    assert bounded.seen["dropped_share"] == 0


@pytest.mark.parametrize("over", ["sequence", "batch"])
def test_experts_choose_their_best_tokens(over, mixture_of):
    mixture = mixture_of(choice="expert", top_k=1, balance={"load_balance": 0}, dispatch={"over": over})
    scores = np.where(LIVE[..., None], mixture.scores, -1.0)
    parts = scores if over == "sequence" else scores.reshape(1, -1, EXPERTS)
    places = parts.shape[1] // EXPERTS
    taken = np.zeros(parts.shape, bool)
    np.put_along_axis(taken, np.argsort(-parts, axis=1)[:, :places], True, 1)
    taken = taken.reshape(scores.shape) & LIVE[..., None]
    close(mixture.y, mixture.weighted(np.where(taken, mixture.scores, 0.0)))
    np.testing.assert_array_equal(mixture.seen["routes"], np.where(taken, np.arange(EXPERTS), -1))
    assert mixture.seen["load_imbalance"] == 1
    left = LIVE & ~taken.any(-1)
    assert left.any()
    np.testing.assert_array_equal(mixture.seen["dropped"][..., 0], left)
    assert mixture.seen["dropped_share"] == pytest.approx(left.sum() / LIVE.sum())


def test_experts_that_compute_nothing(mixture_of):
    mixture = mixture_of(top_k=3, zero_experts={"zeros": 1, "copies": 2, "constants": 2, "share": 0.5})
    routes = np.argsort(-mixture.scores, axis=-1)[..., :3]
    weights = np.zeros(mixture.scores.shape)
    np.put_along_axis(weights, routes, np.take_along_axis(mixture.scores, routes, -1), -1)
    weights[~LIVE] = 0
    x, constants = np.asarray(mixture.x), mixture.params["zero_experts"]
    y = mixture.weighted(weights) + weights[..., 5:7].sum(-1, keepdims=True) * x
    parts = jax.nn.softmax(jnp.einsum("bte,ecp->btcp", mixture.x, constants["mix"]["weight"]))
    for place in range(2):
        constant = parts[..., place, :1] * x + parts[..., place, 1:] * constants["vectors"][place]
        y = y + weights[..., 7 + place, None] * constant
    assert np.all((weights > 0).sum((0, 1)) > 0)
    close(mixture.y, np.asarray(y))
    # Half the load of an expert that computes for those that do not: 4 of 4 + 5 / 0.5 parts.
    spec = mixture.spec
    computing = 2 * 3 * spec.expert.flops_per_token(WIDTH) * 4 * 0.5 / (4 * 0.5 + 5)
    assert spec.flops_per_token(WIDTH) == pytest.approx(computing / 2 + 2 * WIDTH * (9 + 3 * 2))


SCORES = np.exp(np.random.default_rng(0).normal(size=(3, TIME, EXPERTS)))
ROUTES = np.argsort(-SCORES, axis=-1)[..., :2]
DOCUMENTS = np.array([[1] * 5 + [2] * 11, [1] * 7 + [2] * 7 + [0] * 2, [3] * 16], np.int32)


def balance_loss(parts):
    """The tokens' average over parts of experts * sum_e f_e p_e; each part is a boolean mask of tokens."""
    total = 0.0
    for part in parts:
        part = part & (DOCUMENTS != 0)
        loads = np.bincount(ROUTES[part].reshape(-1), minlength=EXPERTS)
        shares = (SCORES / SCORES.sum(-1, keepdims=True))[part].mean(0)
        total += part.sum() * EXPERTS * np.sum(loads / loads.sum() * shares)
    return total / np.sum(DOCUMENTS != 0)


def of_rows(*rows):
    return np.isin(np.arange(3), rows)[:, None] & np.ones(TIME, bool)


@pytest.mark.parametrize(
    ("over", "packed", "parts"),
    [
        ("batch", True, [of_rows(0, 1, 2)]),
        (2, True, [of_rows(0, 1), of_rows(2)]),
        (8, True, [of_rows(0), of_rows(1), of_rows(2)]),
        ("sequence", False, [of_rows(0), of_rows(1), of_rows(2)]),
        ("sequence", True, [of_rows(row) & (DOCUMENTS == d) for row, d in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 3))]),
    ],
)
def test_the_balance_loss_is_of_each_part(over, packed, parts):
    context = Context(jnp.zeros(DOCUMENTS.shape, jnp.int32), jnp.asarray(DOCUMENTS), packed=packed)
    taken = balance.selected(jnp.where(DOCUMENTS[..., None] == 0, -1, ROUTES), EXPERTS)
    got = balance.load_balance(BalanceSpec(over=over), jnp.asarray(SCORES, jnp.float32), taken, context)
    assert float(got) == pytest.approx(balance_loss(parts), rel=1e-5)


def test_losses_are_weighted_and_see_no_padding(mixture_of):
    mixture = mixture_of(lean=0.5, balance={"load_balance": 0.5, "router_z": 0.25})
    logits = np.asarray(mixture.x @ mixture.params["router"]["weight"]) + 0.5 * np.arange(EXPERTS)
    squares = np.log(np.exp(logits).sum(-1)) ** 2
    assert float(mixture.losses["router_z"]) == pytest.approx(0.25 * squares[LIVE].mean(), rel=1e-5)
    routes = np.argsort(-mixture.scores, axis=-1)[..., :2][LIVE]
    loads = np.bincount(routes.reshape(-1), minlength=EXPERTS) / routes.size
    wanted = EXPERTS * np.sum(loads * mixture.scores[LIVE].mean(0))
    assert float(mixture.losses["load_balance"]) == pytest.approx(0.5 * wanted, rel=1e-5)
    entropy = -np.sum(mixture.scores * np.log(mixture.scores), axis=-1)[LIVE].mean()
    assert mixture.seen["router_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert mixture.seen["load_imbalance"] == pytest.approx(EXPERTS * loads.max(), rel=1e-5)


def test_the_correction_makes_loads_equal(mixture_of):
    mixture = mixture_of(
        lean=0.5, router={"scores": "sigmoid", "correction": True}, balance={"load_balance": 0, "correction_rate": 0.02}
    )

    @jax.jit
    def step(params):
        counts = mixture.blueprint(params)(mixture.x, CONTEXT)[1].observed
        stacked = jax.tree.map(lambda leaf: leaf[None], (params, {"expert_load": counts["expert_load"]}))
        return jax.tree.map(lambda leaf: leaf[0], mixture.spec.corrected(*stacked)), counts["load_imbalance"]

    params, imbalance = mixture.params, []
    for _ in range(60):
        params, found = step(params)
        imbalance.append(float(found))
    assert imbalance[0] > 1.5
    assert np.mean(imbalance[-10:]) < 1.2
    moved = np.asarray(params["router"]["correction"])
    assert moved[0] > 0 > moved[-1]


def test_the_router_is_float32_under_bfloat16(mixture_of):
    mixture = mixture_of(top_k=3)
    x = mixture.x.astype(jnp.bfloat16)
    run = jax.jit(functools.partial(lambda params, x: mixture.blueprint(params)(x, CONTEXT)))
    (narrow, seen), (wide, wanted) = run(mixture.params, x), run(mixture.params, x.astype(jnp.float32))
    assert narrow.dtype == jnp.bfloat16
    for name in ("routes", "route_weights", "router_entropy"):
        np.testing.assert_array_equal(seen.observed[name], wanted.observed[name])
    np.testing.assert_allclose(narrow.astype(jnp.float32), wide, atol=0.03 * float(jnp.abs(wide).max()))
