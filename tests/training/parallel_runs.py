"""Ten steps of tiny models, under a preset of parallelism and on one device; run by `test_parallelism`."""

import sys

import jax
import numpy as np
import optax

from efficient_lm.composition import compose
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.training.parallelism import ParallelismSpec
from efficient_lm.training.step import abstract_state, initial_state, make_step, state_shardings
from kernels_pallas.ahead.collectives import Collective, collectives

BATCH, TIME, VOCABULARY, STEPS = 8, 32, 64, 10
ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2}
SWIGLU = {"kind": "swiglu", "hidden": 48}
MOE = {
    "kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "hidden": 16},
    "balance": {"load_balance": 0.05, "router_z": 0.01}, "shared": {"kind": "swiglu", "hidden": 16},
}  # fmt: skip
BLOCKS = {
    "transformer": {
        "near": {"mixer": {**ATTENTION, "window": 5}, "ffn": SWIGLU},
        "all": {"mixer": ATTENTION, "ffn": SWIGLU},
    },
    "hybrid": {
        "mamba2": {"mixer": {"kind": "mamba2", "state_size": 8, "head_size": 8}},
        "attend": {"mixer": {**ATTENTION, "position": {"kind": "none"}}, "ffn": SWIGLU},
    },
    "moe": {
        "dropless": {"mixer": ATTENTION, "ffn": MOE},
        "bounded": {"mixer": ATTENTION, "ffn": {**MOE, "dispatch": {"capacity_factor": 0.75}}},
    },
}  # fmt: skip


def batches(rows: int):
    """Packed documents of all lengths, some longer than a device's share of the tokens, and padding."""
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = random.integers(0, VOCABULARY, (rows, TIME + 1)).astype(np.int32)
        starts = random.random((rows, TIME)) < 0.06
        starts[:, 0] = True
        segments = np.cumsum(starts, axis=1).astype(np.int32)
        first = np.maximum.accumulate(np.where(starts, np.arange(TIME), 0), axis=1)
        segments[0, -3:], segments[1, -11:] = 0, 0
        weights = (segments != 0).astype(np.float32)
        yield {
            "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments,
            "positions": (np.arange(TIME) - first).astype(np.int32), "weights": weights,
        }  # fmt: skip


def run(blocks, parallelism: ParallelismSpec, devices, rows: int = BATCH, accumulate: int = 1):
    """Losses and norms of all steps, and the last state; its shardings are looked at."""
    spec = ModelSpec.model_validate(
        {"width": 32, "vocab_size": VOCABULARY, "blocks": blocks, "layout": list(blocks), "tied": len(blocks) == 1}
    )
    model, layout, optimizer = spec.build(), parallelism.build(devices), optax.adamw(1e-3)
    layout.check_batch(rows, accumulate)
    layout.check_context(spec, TIME)
    layout.check_experts(spec)
    shardings = state_shardings(model, optimizer, layout)
    begin = jax.jit(lambda key: initial_state(model.init(key), optimizer), out_shardings=shardings)
    step = jax.jit(
        make_step(model, CausalLMSpec(z_loss=1e-3), optimizer, accumulate=accumulate, clip_norm=1.0),
        donate_argnums=0,
        out_shardings=(shardings, layout.replicated),
    )
    found = []
    with layout.active():
        state = begin(jax.random.key(0))
        for batch in batches(rows):
            state, metrics = step(state, layout.batch(batch))
            found.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    homes = jax.tree.map(lambda leaf: leaf.sharding.spec, state["parameters"])
    for moment in (state["optimizer"][0].mu, state["optimizer"][0].nu):
        assert jax.tree.map(lambda leaf: leaf.sharding.spec, moment) == homes, "a moment lives where its parameter does"
    return np.array(found), state


def exchanged(blocks, parallelism: ParallelismSpec, accumulate: int) -> list[Collective]:
    """What the devices of a compiled step exchange."""
    spec = ModelSpec.model_validate({"width": 32, "vocab_size": VOCABULARY, "blocks": blocks, "layout": list(blocks)})
    model, layout, optimizer = spec.build(), parallelism.build(), optax.adamw(1e-3)
    step = make_step(model, CausalLMSpec(), optimizer, accumulate=accumulate)
    state, batch = abstract_state(model, optimizer, layout), layout.abstract_batch(32, TIME)
    homes = jax.tree.map(lambda leaf: leaf.sharding, state), layout.replicated
    with layout.active():
        return collectives(jax.jit(step, out_shardings=homes).lower(state, batch).compile().as_text())


def check_accumulation() -> None:
    """Over the mesh axis `data` gradients travel once, whatever the number of micro-batches; prints ``once``."""
    jax.config.update("jax_disable_most_optimizations", False)
    blocks = BLOCKS["transformer"]
    alone, _ = run(blocks, ParallelismSpec(mesh={"data": 1}), jax.devices()[:1], 16)
    for mesh, rules in (({"data": 8}, {}), ({"data": 2, "fsdp": 4}, {"embed": "fsdp"})):
        parallelism = ParallelismSpec(mesh=mesh, rules=rules)
        losses, state = run(blocks, parallelism, jax.devices(), 16, accumulate=2)
        np.testing.assert_allclose(losses[:, 0], alone[:, 0], rtol=1e-5)
        over_data = [each for each in exchanged(blocks, parallelism, 4) if each.devices == mesh["data"]]
        assert {each.times for each in over_data} == {1}, "nothing over `data` is in the loop over micro-batches"
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state["parameters"]))
        sent, others = sum(each.moved for each in over_data), (mesh["data"] - 1) / mesh["data"]
        assert 2 * others * held <= sent <= 1.05 * 2 * others * held, "gradients, once, and a few scalars"
    print("once")


def main(preset: str, models: list[str]) -> None:
    """Compare; prints ``equal``."""
    values = compose("train", [f"parallelism={preset}"], []).values["parallelism"]
    for name in models:
        alone, _ = run(BLOCKS[name], ParallelismSpec(mesh={"data": 1}), jax.devices()[:1])
        divided, state = run(BLOCKS[name], ParallelismSpec.model_validate(values), jax.devices())
        np.testing.assert_allclose(divided[:, 0], alone[:, 0], rtol=1e-5, err_msg=f"losses of {name} under {preset}")
        np.testing.assert_allclose(divided[:, 1], alone[:, 1], rtol=1e-3, err_msg=f"norms of {name} under {preset}")
        held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state["parameters"]))
        print(name, preset, held / sum(leaf.size for leaf in jax.tree.leaves(state["parameters"])), file=sys.stderr)
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
