"""Early exits: where they read, how they are trained, and depth rules that make a model fit to lose layers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.context import Context
from efficient_lm.models.depth.layer_drop import LayerDropSpec
from efficient_lm.models.exits import AcceleratedStreamSpec, PonderLossSpec, WeightedExitLossSpec
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import parameter_table
from efficient_lm.objectives.causal_lm import CausalLMSpec

VOCAB, WIDTH, TIME, DEPTH = 23, 16, 12, 4
IDS = jax.random.randint(jax.random.key(3), (2, TIME), 0, VOCAB)
ROWS = Context.rows(2, TIME)
WEIGHTS = jnp.ones((2, TIME)).at[0, :3].set(0)
BATCH = {
    "tokens": IDS, "targets": jnp.roll(IDS, -1, 1), "positions": ROWS.positions, "segment_ids": ROWS.segment_ids,
    "weights": WEIGHTS,
}  # fmt: skip


def spec(block=None, **options):
    layer = {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "mlp"}, **(block or {})}
    base = {"width": WIDTH, "vocab_size": VOCAB, "blocks": {"layer": layer}, "layout": ["layer"], "repeats": DEPTH}
    return ModelSpec.model_validate({**base, **options})


def trained(model, params, key=None, **options):
    """Sums of a training batch and the gradient of the loss."""

    def loss(params):
        sums = CausalLMSpec(**options).sums(model, params, BATCH, jnp.float32, False, key)
        return sums.loss, sums

    gradient, sums = jax.jit(jax.grad(loss, has_aux=True))(params)
    return sums, gradient


def test_weights_are_layerskips():
    # e = 0.2 * (0 + 1), 0.2 * (0 + 1 + 2) for the exits, and 3 + 0.2 * (0 + 1 + 2) for the head of four layers.
    shares = WeightedExitLossSpec(scale=0.2).shares((2, 3), 4)
    np.testing.assert_allclose(shares, np.array([0.2, 0.6, 3.6]) / 4.4)
    np.testing.assert_allclose(
        WeightedExitLossSpec(weights="linear", scale=1.0).shares((1, 2), 4), [1 / 7, 2 / 7, 4 / 7]
    )
    np.testing.assert_allclose(WeightedExitLossSpec(weights="constant", scale=0.5).shares((2,), 4), [1 / 3, 2 / 3])


def test_an_exit_is_the_head_of_a_shallower_model(bold):
    model = spec(exits={"layers": [1, 3], "loss": {"kind": "weighted", "scale": 0.5}}).build()
    params = bold(model)
    sums, gradient = trained(model, params, z_loss=1e-3)
    assert "exits" not in params and all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    found, objective = {}, CausalLMSpec(z_loss=1e-3)
    for place in (1, 3, DEPTH):
        shallow = spec(repeats=place).build()
        part = params | {"stack": jax.tree.map(lambda leaf, place=place: leaf[:place], params["stack"])}
        found[place] = jax.jit(partial(objective.sums, shallow, batch=BATCH, dtype=jnp.float32, packed=False))(part)
        name = "cross_entropy" if place == DEPTH else f"exit_{place}_cross_entropy"
        assert float(sums.metrics[name]) == pytest.approx(float(found[place].metrics["cross_entropy"]), rel=1e-5)
    shares = WeightedExitLossSpec(scale=0.5).shares((1, 3), DEPTH)
    want = sum(share * float(part.loss) for share, part in zip(shares, found.values(), strict=True))
    assert float(sums.loss) == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_pondering_is_its_equations(bold):
    model = spec(
        exits={"layers": [1, 2], "norm": "own", "loss": {"kind": "ponder", "prior": 0.3, "penalty": 0.5}}
    ).build()
    params = bold(model)
    sums, gradient = trained(model, params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    hidden, streams, _ = jax.jit(model.hidden_with_exits)(params, IDS)
    read = [*(model.exits.normed(params, i, streams.read[i], None) for i in range(2)), hidden]
    halting = params["exits"]["halting"]
    leave = [1 / (1 + np.exp(-(np.asarray(read[i]) @ halting["weight"][i] + halting["bias"][i]))) for i in range(2)]
    shares = np.stack([leave[0], (1 - leave[0]) * leave[1], (1 - leave[0]) * (1 - leave[1])])
    losses = []
    for stream in read:
        logs = jax.nn.log_softmax(model.logits_from(params, stream))
        losses.append(-np.take_along_axis(np.asarray(logs), np.asarray(BATCH["targets"])[..., None], -1)[..., 0])
    prior = np.array([0.3, 0.21, 0.147])
    divergence = np.sum(shares * np.log(shares / (prior / prior.sum())[:, None, None]), 0)
    want = np.sum(WEIGHTS * (np.sum(shares * np.stack(losses), 0) + 0.5 * divergence))
    assert float(sums.loss) == pytest.approx(float(want), rel=1e-5)
    assert float(sums.metrics["cross_entropy"]) == pytest.approx(float(np.sum(WEIGHTS * losses[-1])), rel=1e-5)
    assert float(sums.metrics["exit_2_share"]) == pytest.approx(float(np.sum(WEIGHTS * shares[1])), rel=1e-5)
    np.testing.assert_allclose(PonderLossSpec(prior=0.3).distribution(2), prior / prior.sum())


@pytest.mark.slow
def test_an_accelerated_stream_runs_ahead(bold):
    stream = {"rank": 3, "rate": 2.0, "alignment": 0.7}
    model = spec(exits={"layers": [1, 3], "stream": stream}).build()
    params = bold(model)
    _, streams, _ = jax.jit(model.hidden_with_exits)(params, IDS)
    every = spec(exits={"every": 1}).build()
    start = every.entered(params, IDS)[0]
    own = [start, *jax.jit(every.hidden_with_exits)(params, IDS)[1].read]
    fast, weights = own[0], params["exits"]["stream"]
    for layer in range(3):
        pair = jnp.stack([fast, own[layer]], -2)
        low = jax.nn.silu(jnp.einsum("btsd,sdr->btr", pair, weights["down"]["weight"][layer]))
        fast = fast + low @ weights["up"]["weight"][layer]
        if layer == 0:
            np.testing.assert_allclose(streams.read[0], fast, atol=1e-4)
    np.testing.assert_allclose(streams.read[1], fast, atol=1e-4)
    # Behind the first layer the stream aims at the second, behind the third at the last.
    np.testing.assert_allclose(streams.targets[0], own[2], atol=1e-4)
    last = jax.jit(lambda params: model.stack(params["stack"], start, ROWS)[0])(params)
    np.testing.assert_allclose(streams.targets[1], last, atol=1e-4)
    assert [AcceleratedStreamSpec().target(place, 8) for place in (1, 7)] == [8, 8]
    sums, gradient = trained(model, params)
    distance = np.sum((streams.read - streams.targets) ** 2, -1) / np.sum(streams.targets**2, -1)
    want = float(np.sum(WEIGHTS * distance.mean(0)))
    assert float(sums.metrics["exit_alignment"]) == pytest.approx(want, rel=1e-4)
    weighted = WeightedExitLossSpec().shares((1, 3), DEPTH)
    names = ("exit_1_cross_entropy", "exit_3_cross_entropy", "cross_entropy")
    losses = sum(share * float(sums.metrics[name]) for share, name in zip(weighted, names, strict=True))
    assert float(sums.loss) == pytest.approx(losses + 0.7 * want, rel=1e-4)
    assert float(jnp.abs(gradient["exits"]["stream"]["down"]["weight"][:3]).max(axis=(1, 2, 3)).min()) > 0


def test_exits_declare_their_parameters_and_cost():
    plain, model = spec().build(), spec(exits={"every": 2, "norm": "own", "stream": {"rank": 3}}).build()
    assert set(plain.declarations) == {"embedding", "stack", "head"}
    table = dict(parameter_table(model.declarations))
    assert table["exits.norm.scale"].axes == ("exits", "embed") and table["exits.norm.scale"].shape == (1, WIDTH)
    assert table["exits.stream.down.weight"].axes == ("layers", "streams", "embed", "rank")
    stream, head = 2 * DEPTH * 3 * WIDTH * 3, 2 * WIDTH * VOCAB
    assert model.flops_per_token(TIME) == plain.flops_per_token(TIME)
    more = model.training_flops_per_token(TIME) - plain.training_flops_per_token(TIME)
    assert more == pytest.approx(3 * (stream + head))


@pytest.mark.parametrize(
    ("exits", "words"),
    [
        ({}, "model.exits.layers: say where exits are: either a list of layers, or every=N"),
        ({"every": 4}, "model.exits.every: an exit behind every 4 of 4 layers is none but the head; valid: 1 to 3"),
        ({"layers": [2, 4]}, "model.exits.layers: there is no exit behind layer 4 of 4 but the head; valid: 1 to 3"),
        ({"layers": [3, 1]}, "model.exits.layers: [3, 1] must go up; did you mean [1, 3]?"),
        ({"every": 1, "loss": {"kind": "ponder", "prior": 1}}, "model.exits.loss.prior: 1.0 leaves always or never"),
        ({"every": 1, "loss": {"kind": "ponder", "penalty": -1}}, "exits.loss.penalty\n  Input should be"),
        ({"every": 1, "loss": {"kind": "pondr"}}, "did you mean 'ponder'?"),
    ],
)
def test_faults_name_the_key(exits, words):
    with pytest.raises((ConfigError, ValueError)) as error:
        spec(exits=exits)
    assert words in str(error.value)


def test_rows_pass_by_deep_layers_in_training_alone():
    rule, x = LayerDropSpec(rate=0.8).build(WIDTH, None), jnp.ones((4000, 2, 1))

    def shares(layer, key):
        context = Context(
            jnp.zeros((4000, 2), jnp.int32), jnp.ones((4000, 2), jnp.int32), layer=layer, layers=5, key=key
        )
        y = np.asarray(rule(lambda x, context, cache: (x + 1, cache, None), x, context, None)[0])[..., 0]
        assert np.array_equal(y[:, 0], y[:, 1])
        return np.mean(y == 1)

    for layer in range(5):
        assert shares(layer, None) == 0
        assert shares(layer, jax.random.key(1)) == pytest.approx(0.8 * (2 ** (layer / 4) - 1), abs=0.025)


def test_a_model_trains_with_dropped_layers_and_evaluates_whole(bold):
    plain, model = spec().build(), spec({"depth": {"kind": "layer_drop", "rate": 0.9}}).build()
    params = bold(plain)
    whole = jax.jit(lambda params: CausalLMSpec().sums(plain, params, BATCH, jnp.float32, False).loss)(params)
    evaluated = jax.jit(lambda params: CausalLMSpec().sums(model, params, BATCH, jnp.float32, False).loss)(params)
    assert float(evaluated) == pytest.approx(float(whole), rel=1e-6)
    sums, gradient = trained(model, params, jax.random.key(2))
    assert abs(float(sums.loss - whole)) > 1e-2 and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    assert model.flops_per_token(TIME) == plain.flops_per_token(TIME)
