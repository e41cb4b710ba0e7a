"""Tokens per second of a training step: this framework, the same model written by hand in JAX, and torch.

    export PYTHONPATH=.                                          # where the package is not installed
    python benchmarks/train_step.py [--torch PYTHON]             # float32 on a CPU, a Llama of 8 layers
    python benchmarks/train_step.py --dtype bfloat16 --width 768 --layers 12 --heads 12 --hidden 2048 \\
        --vocabulary 32768 --batch 32 --time 2048                # an accelerator; prints its utilisation too
    python benchmarks/train_step.py --compile-time               # 6 layers against 48
    python benchmarks/train_step.py --architecture mamba2 --torch PYTHON   # or mamba: this framework and torch

The arms take turns, a few steps each, for several rounds: ratios are of times in the same round, so that what else
the machine does meets all of them. Arms:

- ``framework``: `efficient_lm`, the step as training runs it, batches put on the device each time;
- ``kernels``: the same with Pallas kernels wherever they honour the call, on TPUs and Hopper GPUs;
- ``hand_written``: plain dicts and `jax.jit`, with the operators of `kernels_pallas`: what the framework itself costs;
- ``plain``: the same with JAX's own operations only, as one writes them first;
- ``torch``: the model in transformers and `torch.optim.AdamW` (see train_step_torch.py), in a process of its own.

Needs jax, flax, optax and pydantic. Utilisation counts matrix products and causal attention (halved), forward and
backward, the head but not the embedding, over the time of the whole step, optimizer included.
"""

import argparse
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import surroundings

from efficient_lm.elastic.nesting import WHOLE, NestingSpec
from efficient_lm.models.language_model import LanguageModel, ModelSpec
from efficient_lm.models.parameters import count_parameters
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.training.optimizers.adamw import AdamWSpec
from efficient_lm.training.parallelism import ParallelismSpec
from efficient_lm.training.step import initial_state, make_step, state_shardings
from kernels_pallas.attention import attention
from kernels_pallas.benchmark.ceilings import matmul_flops
from kernels_pallas.dispatch import preferring
from kernels_pallas.linear_cross_entropy import linear_cross_entropy

LEARNING_RATE, BETAS, EPSILON, DECAY, CLIP_NORM, NORM_EPSILON = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0, 1e-6
HERE = Path(__file__).parent
Params = dict[str, Any]
Round = Callable[[int], float]
"""Run that many steps; seconds they took."""


def model_spec(options: argparse.Namespace, layers: int | None = None) -> ModelSpec:
    """The model that every arm trains: a Llama, or blocks of nothing but a Mamba mixer."""
    mixer, ffn = {"kind": options.architecture}, None
    if options.architecture == "llama":
        mixer, ffn = {"kind": "attention", "heads": options.heads}, {"kind": "swiglu", "hidden": options.hidden}
    rest = {} if options.remat is None else {"remat": options.remat}
    rest |= {"vocab_size": options.vocabulary, "repeats": layers or options.layers}
    return ModelSpec(width=options.width, blocks={"layer": {"mixer": mixer, "ffn": ffn}}, layout=["layer"], **rest)


def make_batch(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Random tokens; rows are packed with documents of `--document` tokens on average, or hold one each."""
    draw = np.random.default_rng(0)
    shape = (options.batch, options.time)
    tokens = draw.integers(1, options.vocabulary, (options.batch, options.time + 1), dtype=np.int32)
    starts = draw.random(shape) < (1 / options.document if options.document else 0)
    starts[:, 0] = True
    index = np.arange(options.time, dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
        "positions": index - np.maximum.accumulate(np.where(starts, index, 0), axis=1),
        "weights": np.ones(shape, np.float32),
    }


# The framework


def framework_parts(model: LanguageModel) -> tuple[Any, Any, Any]:
    """Optimizer, layout and the sharding of the state."""
    optimizer = AdamWSpec(weight_decay=DECAY).build(lambda step: LEARNING_RATE, model.declarations)
    layout = ParallelismSpec().build()
    return optimizer, layout, state_shardings(model, optimizer, layout)


def framework_step(
    model: LanguageModel, options: argparse.Namespace, nesting: NestingSpec = WHOLE, kernels: str = "auto"
) -> Callable:
    """The jitted step, as a run with `train.kernels` has it."""
    optimizer, layout, shardings = framework_parts(model)
    packed = bool(options.document)
    step = make_step(
        model, CausalLMSpec(), optimizer, clip_norm=CLIP_NORM, dtype=options.dtype, packed=packed, nesting=nesting
    )

    def traced(state: Any, batch: Any) -> tuple[Any, Any]:
        with preferring(kernels):
            return step(state, batch)

    return jax.jit(traced, donate_argnums=0, out_shardings=(shardings, layout.replicated))


def framework_arm(
    spec: ModelSpec,
    options: argparse.Namespace,
    batch: dict[str, np.ndarray],
    nesting: NestingSpec = WHOLE,
    kernels: str = "auto",
) -> tuple[Round, float]:
    """A round of the framework's steps on a model, and the loss of the first."""
    model = spec.build()
    optimizer, layout, shardings = framework_parts(model)
    step = framework_step(model, options, nesting, kernels)
    state = jax.jit(lambda key: initial_state(model.init(key), optimizer), out_shardings=shardings)(jax.random.key(0))
    return jax_rounds(step, state, lambda: layout.batch(batch))


def jax_rounds(step: Callable, state: Any, next_batch: Callable) -> tuple[Round, float]:
    """Rounds of a jitted ``step(state, batch) -> (state, metrics)`` that donates its state."""
    state, metrics = step(state, next_batch())
    first = float(metrics["loss"])

    def run(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, next_batch())
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return run, first


# The same model by hand


def hand_written_params(params: Params) -> Params:
    """The framework's fresh parameters in this file's layout: stacked over layers, q, k, v in one matrix."""
    layer = params["stack"]["segment_0"]["layer_0"]
    mixer, ffn = layer["mixer"]["inner"], layer["ffn"]["inner"]
    layers, width = layer["mixer"]["input_norm"]["scale"].shape
    parts = [mixer["query"]["weight"], mixer["key_value"]["weight"]]
    return {
        "embedding": params["embedding"]["tokens"],
        "layers": {
            "mixer_norm": layer["mixer"]["input_norm"]["scale"],
            "qkv": jnp.concatenate([part.reshape(layers, width, -1) for part in parts], axis=-1),  # columns q, k, v
            "out": mixer["output"]["weight"].reshape(layers, -1, width),
            "ffn_norm": layer["ffn"]["input_norm"]["scale"],
            "gate_up": ffn["gate_up"]["weight"].reshape(layers, width, -1),
            "down": ffn["down"]["weight"],
        },
        "norm": params["head"]["norm"]["scale"],
        "head": params["head"]["weight"],
    }


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array | None) -> jax.Array:
    """Causal softmax attention within documents, all logits at once; arguments as `kernels_pallas.attention`."""
    index = jnp.arange(q.shape[1])
    seen = (index[:, None] >= index)[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    mask = jnp.where(seen, 0.0, -1e30)[:, None]
    logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5 + mask, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def plain_loss(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum of the weighted cross entropies, from all logits at once."""
    logits = jnp.matmul(x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked))


def kernel_loss(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum of the weighted cross entropies, without materialised logits where that is better."""
    return linear_cross_entropy(x, head, targets, weights).loss_sum


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + NORM_EPSILON) * scale).astype(x.dtype)


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


def hand_written_loss(
    params: Params, batch: Params, options: argparse.Namespace, attend: Callable, loss: Callable
) -> jax.Array:
    """Mean cross entropy of a batch."""
    rows, heads, size = batch["tokens"].shape, options.heads, options.width // options.heads
    segment_ids = batch["segment_ids"] if options.document else None
    frequencies = 10000.0 ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = batch["positions"][..., None, None] * frequencies
    cosine, sine = jnp.cos(angles), jnp.sin(angles)

    def layer(x: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        weights = {name: value if value.ndim == 1 else value.astype(x.dtype) for name, value in weights.items()}
        q, kv = jnp.split(weights["qkv"], [options.width], axis=1)
        normed = rms_norm(x, weights["mixer_norm"])
        q, kv = (normed @ q).reshape(*rows, heads, size), (normed @ kv).reshape(*rows, 2, heads, size)
        k, v = kv[:, :, 0], kv[:, :, 1]
        y = attend(rotate(q, cosine, sine), rotate(k, cosine, sine), v, segment_ids=segment_ids)
        x = x + y.reshape(x.shape) @ weights["out"]
        both = (rms_norm(x, weights["ffn_norm"]) @ weights["gate_up"]).reshape(len(x), 2, -1)
        return x + (jax.nn.silu(both[:, 0]) * both[:, 1]) @ weights["down"], None

    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    layer = jax.checkpoint(layer, policy=saved, prevent_cse=False) if options.peer_remat == "dots" else layer
    x = params["embedding"][batch["tokens"].reshape(-1)].astype(options.dtype)
    x, _ = jax.lax.scan(layer, x, params["layers"])
    x = rms_norm(x, params["norm"])
    weights = batch["weights"].reshape(-1)
    return loss(x, params["head"], batch["targets"].reshape(-1), weights) / jnp.maximum(jnp.sum(weights), 1.0)


def hand_written_arm(
    options: argparse.Namespace, batch: dict[str, np.ndarray], attend: Callable, loss: Callable
) -> tuple[Round, float]:
    """A round of hand-written steps, and the loss of the first."""
    params = jax.jit(lambda key: hand_written_params(model_spec(options).build().init(key)))(jax.random.key(0))
    mask = {**dict.fromkeys(params, False), "head": True}
    mask["layers"] = {name: not name.endswith("norm") for name in params["layers"]}
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(LEARNING_RATE, *BETAS, eps=EPSILON, weight_decay=DECAY, mask=mask),
    )

    def step(state: tuple[Params, Any], batch: Params) -> tuple[tuple[Params, Any], Params]:
        params, moments = state
        value, grads = jax.value_and_grad(hand_written_loss)(params, batch, options, attend, loss)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), {"loss": value}

    state = (params, optimizer.init(params))
    return jax_rounds(jax.jit(step, donate_argnums=0), state, lambda: jax.device_put(batch))


# torch


def torch_arm(options: argparse.Namespace) -> tuple[Round, float, str]:
    """A round of torch's steps in its own process, the loss of the first, and torch's versions."""
    names = ("architecture", "width", "layers", "heads", "hidden", "vocabulary", "batch", "time", "dtype")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"learning_rate": LEARNING_RATE, "betas": BETAS, "epsilon": EPSILON, "decay": DECAY}
    settings |= {"clip_norm": CLIP_NORM, "norm_epsilon": NORM_EPSILON}
    command = [options.torch, str(HERE / "train_step_torch.py"), json.dumps(settings)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def answer() -> Any:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the torch process ended with status {process.wait()}")
        return json.loads(line)

    def run(steps: int) -> float:
        process.stdin.write(f"{steps}\n")
        return answer()

    ready = answer()
    return run, ready["loss"], ready["versions"]


# Measuring


def alternate(arms: dict[str, Round], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of every arm in every round; the arm that begins changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(arms[name](steps) / steps)
    return seconds


def build_arms(options: argparse.Namespace) -> tuple[dict[str, Round], dict[str, float], str | None]:
    """The arms asked for, compiled and warm; the loss of each one's first step; torch's versions."""
    batch = make_batch(options)
    makers = {
        "framework": lambda: framework_arm(model_spec(options), options, batch),
        "kernels": lambda: framework_arm(model_spec(options), options, batch, kernels="pallas"),
        "hand_written": lambda: hand_written_arm(options, batch, attention, kernel_loss),
        "plain": lambda: hand_written_arm(options, batch, plain_attention, plain_loss),
    }
    arms, losses, versions = {}, {}, None
    for name in options.arms:
        arms[name], losses[name] = makers[name]()
    if options.torch:
        arms["torch"], losses["torch"], versions = torch_arm(options)
    mine = [losses[name] for name in options.arms]
    if max(mine) - min(mine) > (1e-4 if options.dtype == "float32" else 2e-2) * max(mine):
        raise SystemExit(f"the arms do not train the same model: losses of the first step {losses}")
    return arms, losses, versions


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return what is kept."""
    arms, losses, torch_versions = build_arms(options)
    seconds = alternate(arms, options.rounds, options.steps)
    tokens, peak = options.batch * options.time, peak_flops(options.dtype)
    model = model_spec(options).build()
    flops = 3 * model.flops_per_token(options.time) * tokens
    results = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        results[name] = {
            "tokens_per_second": round(tokens / median, 1),
            "tokens_per_second_best": round(tokens / min(times), 1),
            "teraflops_per_second": round(flops / median / 1e12, 4),
            "utilisation": peak and round(flops / median / peak, 4),
            "framework_over_this": ratio(seconds, "framework", name),
            "first_loss": losses[name],
            "seconds": times,
        }
        shown = {key: value for key, value in results[name].items() if key not in ("seconds", "first_loss")}
        print(f"{name:13}", "  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    counts = {"parameters": count_parameters(model.declarations), "flops_per_step": flops, "remat": model.spec.remat}
    return {"arms": results, **counts, "torch": torch_versions}


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float | None:
    """Median over rounds of one arm's time over another's."""
    if above not in seconds:
        return None
    return round(statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True)), 4)


def peak_flops(dtype: str) -> float | None:
    """What the devices can do at most in products of a type; None if it is not known."""
    peak = matmul_flops(jax.devices()[0].device_kind, dtype)
    return peak and peak * jax.device_count()


def compile_times(options: argparse.Namespace, depths: tuple[int, ...] = (6, 48)) -> dict[str, Any]:
    """Seconds to trace and compile the framework's step, by depth; the best of a few, without any cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    batch = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in make_batch(options).items()}
    best = dict.fromkeys(depths, math.inf)
    for _ in range(options.rounds):
        for depth in depths:
            best[depth] = min(best[depth], compile_once(options, depth, batch))
    quotient = best[depths[-1]] / best[depths[0]]
    print(", ".join(f"{depth} layers {value:.2f} s" for depth, value in best.items()), f"ratio {quotient:.2f}")
    return {"seconds_by_depth": best, "ratio": quotient}


def compile_once(options: argparse.Namespace, depth: int, batch: dict[str, jax.ShapeDtypeStruct]) -> float:
    """Seconds from the spec to a compiled step."""
    jax.clear_caches()
    start = time.perf_counter()
    model = model_spec(options, depth).build()
    optimizer, _, _ = framework_parts(model)
    state = jax.eval_shape(lambda: initial_state(model.init(jax.random.key(0)), optimizer))
    framework_step(model, options).lower(state, batch).compile()
    return time.perf_counter() - start


def shapes(description: str, document: int = 128, hidden: int = 1024) -> argparse.ArgumentParser:
    """A command line with the shapes of a Llama of 8 layers, how often its steps are timed, and where that is kept."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    sizes = {"width": 256, "layers": 8, "heads": 4, "hidden": hidden, "vocabulary": 4096, "batch": 8, "time": 256}
    for name, size in (sizes | {"rounds": 7, "steps": 3}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument(
        "--document", type=int, default=document, help="mean tokens per document; 0: rows are not packed"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", choices=("none", "full", "dots", "names"), help="of the framework's models")
    parser.add_argument("--output", type=Path, help="file of the results; default: by what and device in results/")
    return parser


def keep(what: str, options: argparse.Namespace, results: dict[str, Any], **changed: Any) -> None:
    """Write results with the machine and the options, `changed` ones as given here."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    output = options.output or HERE / "results" / f"{what}_{jax.default_backend()}_{options.dtype}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    about = surroundings("jax", "jaxlib", "flax", "optax")
    output.write_text(json.dumps({**about, "settings": settings | changed, **results}, indent=1) + "\n")
    print(f"kept in {output}")


def parse() -> argparse.Namespace:
    parser = shapes(__doc__, hidden=688)
    parser.add_argument("--peer-remat", choices=("none", "dots"), default="dots", help="of the hand-written arms")
    parser.add_argument("--architecture", choices=("llama", "mamba", "mamba2"), default="llama")
    parser.add_argument("--arms", nargs="+", help="default: framework, and of a llama also hand_written and plain")
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch and transformers")
    parser.add_argument("--compile-time", action="store_true", help="seconds to compile 6 and 48 layers instead")
    options = parser.parse_args()
    options.arms = (
        options.arms or ["framework", "hand_written", "plain"][: None if options.architecture == "llama" else 1]
    )
    return options


def main() -> None:
    options = parse()
    results = compile_times(options) if options.compile_time else report(options)
    family = "" if options.architecture == "llama" else f"{options.architecture}_"
    what = f"{family}compile_time" if options.compile_time else f"train_step_{family}w{options.width}_l{options.layers}"
    keep(what, options, results, torch=options.torch is not None)


if __name__ == "__main__":
    main()
