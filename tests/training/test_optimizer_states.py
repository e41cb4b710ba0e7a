"""What optimizers keep: where it lives, how it comes back from a checkpoint, and what uses it in a step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import load_run_config
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import ZEROS, Declaration
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.loop import train
from efficient_lm.training.optimizers import OptimizerSpec
from efficient_lm.training.optimizers.schedule_free import ScheduleFreeAdamWSpec, followed
from efficient_lm.training.optimizers.sophia import SophiaSpec
from efficient_lm.training.step import initial_state, make_step
from efficient_lm.validation import validate

KINDS = sorted(OptimizerSpec.kinds)

DECLARATIONS = {
    "experts": Declaration((2, 2, 16, 96), ("layers", "experts", "embed", "mlp"), True, ((2,), (3,)), ZEROS),
    "heads": Declaration((2, 8, 2, 4), ("layers", "embed", "heads", "head_dim"), True, ((1,), (2, 3)), ZEROS),
    "norm": Declaration((2, 8), ("layers", "embed"), False, None, ZEROS),
}


def drawn(seed):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.standard_normal(d.shape), jnp.float32) for name, d in DECLARATIONS.items()}


@pytest.mark.parametrize(
    "kinds", [("lion", "schedule_free_adamw"), pytest.param(KINDS, marks=pytest.mark.slow)], ids=len
)
def test_kinds_go_on_from_a_checkpoint_to_the_bit(kinds, tmp_path):
    """All of them in one checkpoint, with moments in each precision."""
    made = {
        f"{kind} {state}": OptimizerSpec.lookup(kind)(state=state).build(lambda step: 1e-2, DECLARATIONS)
        for kind, state in [(kind, "float32") for kind in kinds] + [("adamw", "int8"), ("muon", "bfloat16")]
    }

    def steps(runs, seeds):
        for seed in seeds:
            for name, optimizer in made.items():
                params, state = runs[name]
                diagonal = jax.tree.map(jnp.square, drawn(seed + 50))
                extra = {"curvature": lambda found=diagonal: found} if name.startswith("sophia") else {}
                updates, state = optimizer.update(drawn(seed), state, params, **extra)
                runs[name] = (jax.tree.map(jnp.add, params, updates), state)
        return runs

    begun = steps({name: (drawn(0), optimizer.init(drawn(0))) for name, optimizer in made.items()}, (1, 2))
    folder = Checkpoints(tmp_path)
    items = {
        "parameters": {name: params for name, (params, _) in begun.items()},
        "optimizer": {name: state for name, (_, state) in begun.items()},
    }
    folder.save(2, items, {"step": 2})
    folder.wait()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), items)
    restored, _ = folder.restore(abstract)
    folder.close()
    again = {name: (restored["parameters"][name], restored["optimizer"][name]) for name in made}
    assert jax.tree.structure(again) == jax.tree.structure(begun)
    for found, wanted in zip(jax.tree.leaves(steps(again, (3,))), jax.tree.leaves(steps(begun, (3,))), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_moments_live_where_their_parameters_do(on_devices):
    """Of every kind and precision, on eight devices; nothing is allocated but one state of each sort."""
    code = """
        import json
        import jax, optax
        from efficient_lm.models.language_model import ModelSpec
        from efficient_lm.training.optimizers import OptimizerSpec
        from efficient_lm.training.parallelism import ParallelismSpec
        from efficient_lm.training.step import abstract_state
        from efficient_lm.validation import validate

        expert = {"kind": "swiglu", "hidden": 256}
        block = {"mixer": {"kind": "attention", "heads": 4},
                 "ffn": {"kind": "moe", "experts": 4, "top_k": 2, "expert": expert}}
        model = validate(ModelSpec, {"width": 64, "vocab_size": 512, "blocks": {"a": block}, "layout": ["a"],
                                     "repeats": 2}).build()
        rules = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor", "experts": "expert"}
        layout = ParallelismSpec(mesh={"fsdp": 2, "expert": 2, "tensor": 2}, rules=rules).build()
        found = {}
        with layout.active():
            for kind in sorted(OptimizerSpec.kinds):
                for state in ("float32", "bfloat16", "int8"):
                    spec = OptimizerSpec.lookup(kind)(state=state)
                    optimizer = spec.build(lambda step: 1.0, model.declarations)
                    whole = abstract_state(model, optimizer, layout)
                    flat, _ = jax.tree.flatten(whole["parameters"])
                    places = {leaf.shape: leaf.sharding.spec for leaf in flat}
                    kept = jax.tree.leaves(whole["optimizer"])
                    alike = [leaf for leaf in kept if leaf.shape in places]
                    same = sum(leaf.sharding.spec == places[leaf.shape] for leaf in alike)
                    others = [leaf for leaf in kept if leaf.shape not in places and leaf.size > 512]
                    split = sum(any(leaf.sharding.spec) for leaf in others)
                    found[f"{kind} {state}"] = [len(alike), same, len(others), split]
            optimizer = OptimizerSpec.lookup("adamw")(state="int8").build(lambda step: 1.0, model.declarations)
            whole = abstract_state(model, optimizer, layout)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, whole["optimizer"])
            params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), whole["parameters"])
            made = jax.jit(optimizer.init, out_shardings=shardings)(params)
            large = [leaf for leaf in jax.tree.leaves(made) if leaf.size > 9000]
            sizes = [leaf.addressable_shards[0].data.size / leaf.size for leaf in large]
        print(json.dumps([found, sizes]))
    """
    found, sizes = json.loads(on_devices(8, code).splitlines()[-1])
    for name, (alike, same, other, split) in found.items():
        assert alike == same, name
        # Scales of codes, outer products and factors are divided along the axes that they share.
        assert split == other, (name, other, split)
    moments = {"adamw float32": 2, "lion int8": 1, "sgd float32": 1, "soap float32": 2, "schedule_free_adamw int8": 2}
    parameters = found["lion float32"][0]
    for name, count in moments.items():
        assert found[name][0] == count * parameters, name
    assert found["adafactor float32"][0] < parameters
    assert max(sizes) <= 0.5 and min(sizes) == 0.125


MODEL = validate(
    ModelSpec,
    {
        "width": 16,
        "vocab_size": 31,
        "blocks": {"layer": {"mixer": {"kind": "attention", "heads": 2}, "ffn": {"kind": "swiglu", "hidden": 32}}},
        "layout": ["layer"],
    },
).build()


def batch(rows=4, time=12):
    tokens = jax.random.randint(jax.random.key(1), (rows, time + 1), 0, 31)
    ones = jnp.ones((rows, time), jnp.int32)
    found = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "weights": ones * 1.0}
    return found | {"positions": jnp.broadcast_to(jnp.arange(time), (rows, time))}


@pytest.mark.slow
def test_targets_are_drawn_from_the_model():
    params, rows = MODEL.init(jax.random.key(0)), batch(8, 24)
    params["head"]["weight"] = params["head"]["weight"] * 40
    keys = jax.random.split(jax.random.key(1), 40)
    drawn = [CausalLMSpec().drawn(MODEL, params, rows, jnp.float32, True, key)["targets"] for key in keys]
    odds = jax.nn.softmax(MODEL.logits(params, rows["tokens"]))
    found = np.mean(jax.nn.one_hot(jnp.stack(drawn), 31), axis=0)
    assert drawn[0].shape == (8, 24) and drawn[0].dtype == jnp.int32
    assert np.sqrt(np.mean((found - odds) ** 2)) < 1.5 * np.sqrt(np.mean(odds * (1 - odds)) / 40)


@pytest.mark.slow
def test_sophia_is_given_the_curvature_of_the_batch():
    """Squared gradients of drawn targets times the tokens they are a mean of, whatever the micro-batches."""
    optimizer = SophiaSpec(interval=2).build(lambda step: 1e-3, MODEL.declarations)
    step = jax.jit(make_step(MODEL, CausalLMSpec(), optimizer, accumulate=2))
    before = initial_state(MODEL.init(jax.random.key(0)), optimizer)
    after, metrics = step(before, batch())
    kept = after["optimizer"][0].curvature
    assert np.isfinite(metrics["loss"]) and all(np.all(leaf >= 0) for leaf in jax.tree.leaves(kept))
    # Of the head's weights it is known: mean over tokens of p (1 - p) x², here about its expectation.
    hidden = MODEL.hidden(before["parameters"], batch()["tokens"])[0].reshape(-1, 16)
    odds = jax.nn.softmax(hidden @ before["parameters"]["head"]["weight"])
    wanted = jnp.einsum("ti,tv->iv", hidden**2, odds * (1 - odds)) / len(hidden)
    found = kept["head"]["weight"] / 0.01
    assert float(found.mean() / wanted.mean()) == pytest.approx(1.0, rel=0.25)
    second, _ = step(after, batch())
    for leaf, other in zip(jax.tree.leaves(second["optimizer"][0].curvature), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_what_else_moves_parameters_moves_the_averaged_point_too():
    optimizer = ScheduleFreeAdamWSpec().build(lambda step: 0.1, DECLARATIONS)
    state, before = optimizer.init(drawn(0)), drawn(0)
    after = before | {"norm": before["norm"] + 1.0}
    found = followed(state, before, after)
    np.testing.assert_allclose(found.z["norm"], before["norm"] + 1.0, rtol=1e-6)
    assert found.z["heads"] is state.z["heads"]


def config(path, *more):
    return load_run_config(
        [
            "model.width=32", "mixer.heads=2", "model.repeats=2", "train.batch_size=8", "train.sequence_length=64",
            "train.evaluate_every=null", "train.log_every=1", f"run.dir={path}", *more,
        ]
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains(kind, tmp_path):
    schedule = "constant" if kind.startswith("schedule_free") else "cosine"
    train(config(tmp_path, f"optimizer={kind}", f"schedule={schedule}", "train.steps=40"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 40 and np.mean(losses[-5:]) < losses[0] - 0.3, losses[::8]


@pytest.mark.slow
def test_on_text_they_are_of_a_kind(tmp_path):
    """300 steps on the embedded corpus: none is far behind AdamW, and eight bits change next to nothing."""
    runs = dict.fromkeys(("adamw", "muon", "lion", "soap", "schedule_free_adamw"), ())
    runs["int8"] = ("optimizer.state=int8",)
    losses = {}
    for name, more in runs.items():
        kind = "adamw" if name == "int8" else name
        schedule = "constant" if kind.startswith("schedule_free") else "cosine"
        options = (f"optimizer={kind}", f"schedule={schedule}", "train.steps=300", "train.log_every=100", *more)
        losses[name] = train(config(tmp_path / name, *options))["val_loss"]
    assert max(losses.values()) < losses["adamw"] + 0.25, losses
    assert abs(losses["int8"] - losses["adamw"]) < 0.02, losses
