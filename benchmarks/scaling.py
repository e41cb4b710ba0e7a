"""Tokens per second of a training step on 1 to 8 devices, for every preset of configs/parallelism.

    export PYTHONPATH=.                              # where the package is not installed
    python benchmarks/scaling.py                     # virtual CPU devices; a Llama, and with experts a mixture of them
    python benchmarks/scaling.py --real --dtype bfloat16 --width 2048 --layers 24 --heads 16 --batch 64 --time 4096

The batch stays the same. Virtual devices share the machine's cores: with 2 cores, 8 of them show what dividing the work
costs, and nothing of what it gains. Each number of devices has a process of its own; they take turns, a few steps each,
and ratios are of times in the same round. Needs jax, flax, optax and pydantic.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import yaml
from train_step import CLIP_NORM, DECAY, HERE, LEARNING_RATE, alternate, keep, make_batch, shapes

from efficient_lm.models.language_model import ModelSpec
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.training.optimizers.adamw import AdamWSpec
from efficient_lm.training.parallelism import ParallelismSpec
from efficient_lm.training.step import initial_state, make_step, state_shardings

PRESETS = {path.stem: path for path in sorted((HERE.parent / "configs" / "parallelism").glob("*.yaml"))}
VIRTUAL = "--xla_force_host_platform_device_count"


def spec_of(preset: str, devices: int) -> ParallelismSpec:
    """A preset on so many devices: an axis of a fixed size takes what of it divides them."""
    values = yaml.safe_load(PRESETS[preset].read_text())
    mesh = {axis: size if size == -1 else math.gcd(size, devices) for axis, size in values["mesh"].items()}
    return ParallelismSpec.model_validate({**values, "mesh": mesh})


def model_of(options: argparse.Namespace, preset: str) -> ModelSpec:
    """A Llama, or with the same FLOPs per token a mixture of 8 experts where a preset divides experts."""
    ffn: dict[str, Any] = {"kind": "swiglu", "hidden": options.hidden}
    if "expert" in yaml.safe_load(PRESETS[preset].read_text())["mesh"]:
        ffn = {"kind": "moe", "experts": 8, "top_k": 2, "expert": {**ffn, "hidden": options.hidden // 2}}
    block = {"mixer": {"kind": "attention", "heads": options.heads}, "ffn": ffn}
    shape = {"width": options.width, "vocab_size": options.vocabulary, "repeats": options.layers}
    return ModelSpec.model_validate({**shape, "blocks": {"layer": block}, "layout": ["layer"]})


def child(options: argparse.Namespace) -> None:
    """Compile, say the first loss, then for every number read run so many steps and say the seconds they took."""
    from train_step import jax_rounds

    devices = jax.devices()[: options.count]
    layout, model = spec_of(options.preset, options.count).build(devices), model_of(options, options.preset).build()
    optimizer = AdamWSpec(weight_decay=DECAY).build(lambda step: LEARNING_RATE, model.declarations)
    shardings = state_shardings(model, optimizer, layout)
    step = make_step(model, CausalLMSpec(), optimizer, clip_norm=CLIP_NORM, dtype=options.dtype)
    batch = make_batch(options)
    with layout.active():
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
        init = jax.jit(lambda key: initial_state(model.init(key), optimizer), out_shardings=shardings)
        run, loss = jax_rounds(jitted, init(jax.random.key(0)), lambda: layout.batch(batch))
        run(1)
        print(json.dumps(loss), flush=True)
        for line in sys.stdin:
            print(json.dumps(run(int(line))), flush=True)


def start(options: argparse.Namespace, preset: str, count: int) -> tuple[Any, float, subprocess.Popen]:
    """A round of steps in a process with so many devices, the loss of the first, and the process."""
    settings = {**vars(options), "preset": preset, "count": count, "output": None}
    flags = os.environ.get("XLA_FLAGS", "") + ("" if options.real else f" {VIRTUAL}={count}")
    environment = os.environ | {"XLA_FLAGS": flags} | ({} if options.real else {"JAX_PLATFORMS": "cpu"})
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )

    def answer() -> float:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{preset} on {count} devices ended with status {process.wait()}")
        return json.loads(line)

    def run(steps: int) -> float:
        process.stdin.write(f"{steps}\n")
        return answer()

    return run, answer(), process


def measure(options: argparse.Namespace, preset: str) -> dict[str, Any]:
    """One preset on every number of devices."""
    arms = {str(count): start(options, preset, count) for count in options.devices}
    seconds = alternate({name: run for name, (run, _, _) in arms.items()}, options.rounds, options.steps)
    losses = [loss for _, loss, _ in arms.values()]
    for _, _, process in arms.values():
        process.stdin.close()
        process.wait()
    if max(losses) - min(losses) > (1e-4 if options.dtype == "float32" else 2e-2) * max(losses):
        raise SystemExit(f"{preset}: numbers of devices do not compute the same: losses of the first step {losses}")
    first, tokens = seconds[str(options.devices[0])], options.batch * options.time
    results = {}
    for (name, times), loss in zip(seconds.items(), losses, strict=True):
        relative = statistics.median(base / taken for base, taken in zip(first, times, strict=True))
        results[name] = {
            "tokens_per_second": round(tokens / statistics.median(times), 1),
            "speed_over_first": round(relative, 4),
            "mesh": spec_of(preset, int(name)).mesh,
            "first_loss": loss,
            "seconds": times,
        }
        shown = f"{results[name]['tokens_per_second']:10,.0f} tokens/s  {relative:.3f} x"
        print(f"{preset:14}{name:>3} devices {shown}", flush=True)
    return results


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(SimpleNamespace(**json.loads(sys.argv[2])))
        return
    parser = shapes(__doc__, hidden=512)
    parser.set_defaults(layers=4, rounds=5, steps=2)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--real", action="store_true", help="the machine's own devices instead of virtual ones")
    options = parser.parse_args()
    results = {preset: measure(options, preset) for preset in options.presets}
    note = None if options.real else f"virtual devices on {os.cpu_count()} cores: the cost of dividing, not its gain"
    keep("scaling", options, {"note": note, "presets": results})


if __name__ == "__main__":
    main()
