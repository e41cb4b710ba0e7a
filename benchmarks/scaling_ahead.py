"""What an FSDP step costs on pods: memory of a device, and bytes it sends, against what FSDP cannot do without.

    PYTHONPATH=.:.ahead python benchmarks/scaling_ahead.py [--chips 8 64 256] [--output benchmarks/results]

The step of `transformer_1b` (`configs/experiment/transformer_1b.yaml`, written out below) is compiled for topologies of
TPU v5p and of H200 that are not there, with so many rows on every device; needs the packages of the extra `ahead`. The
ideal: every parameter gathered once in the forward and once in the backward pass, and its gradient scattered once, in
bfloat16; P parameters on n devices are ``3 * 2 * P * (n - 1) / n`` bytes, and less where the head, whose gradient is
made with its loss, is gathered once.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import count_parameters, decay_mask
from efficient_lm.objectives.causal_lm import CausalLMSpec
from efficient_lm.training.parallelism import ParallelismSpec
from efficient_lm.training.step import abstract_state, make_step
from kernels_pallas import ahead
from kernels_pallas.ahead.collectives import collectives, totals
from kernels_pallas.dispatch import preferring

ROWS, TIME = 4, 2048
MODEL = {
    "width": 2048, "vocab_size": 50304, "repeats": 16, "layout": ["layer"], "tied": True, "remat": "none",
    "blocks": {"layer": {
        "mixer": {"kind": "attention", "heads": 32, "kv_heads": 8}, "ffn": {"kind": "swiglu", "hidden": 8192},
    }},
}  # fmt: skip
FSDP = {"mesh": {"fsdp": -1}, "rules": {"embed": "fsdp"}}
TOPOLOGIES = {
    8: ("v5p:2x2x2", "h200:1x8"),
    64: ("v5p:4x4x4", "h200:8x8"),
    256: ("v5p:4x8x8", "h200:32x8"),
}


def compiled(topology: str, kernels: str) -> dict[str, Any]:
    """Figures of one step on all devices of a topology."""
    import optax

    devices = list(ahead.devices(topology))
    layout, model = ParallelismSpec(**FSDP).build(devices), ModelSpec.model_validate(MODEL).build()
    optimizer = optax.adamw(4e-4, 0.9, 0.95, weight_decay=0.1, mask=decay_mask(model.declarations))
    step = make_step(model, CausalLMSpec(), optimizer, clip_norm=1.0, dtype=jnp.bfloat16)
    state, batch = abstract_state(model, optimizer, layout), layout.abstract_batch(ROWS * len(devices), TIME)
    homes = jax.tree.map(lambda leaf: leaf.sharding, state), layout.replicated
    began = time.perf_counter()
    with layout.active(), preferring(kernels):
        program = ahead.compile_ahead(
            step, (state, batch), topology, layout.mesh, donate_argnums=0, out_shardings=homes
        )
    seconds = time.perf_counter() - began
    found = collectives(program.program.as_text())
    others, count = (len(devices) - 1) / len(devices), count_parameters(model.declarations)
    head = MODEL["width"] * MODEL["vocab_size"]
    sent, ideal = sum(each.moved for each in found), 6 * count * others
    return {
        "topology": topology,
        "devices": len(devices),
        "tokens_per_device": ROWS * TIME,
        "parameters": count,
        "peak_bytes": program.peak_bytes,
        "state_bytes": round(12 * count / len(devices)),
        "sent_bytes": round(sent),
        "ideal_bytes": round(ideal),
        "ideal_bytes_head_once": round(ideal - 2 * head * others),
        "sent_over_ideal": round(sent / ideal, 4),
        "collectives": {
            kind: {name: round(value) for name, value in row.items()} for kind, row in totals(found).items()
        },
        "compile_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", type=int, nargs="+", default=sorted(TOPOLOGIES), choices=sorted(TOPOLOGIES))
    parser.add_argument("--kinds", nargs="+", default=["v5p", "h200"], choices=["v5p", "h200"])
    parser.add_argument("--kernels", default="xla", choices=["auto", "xla", "pallas"])
    parser.add_argument("--output", type=Path, default=None, help="a folder for scaling_ahead_KIND_CHIPS.json")
    asked = parser.parse_args()
    for chips in asked.chips:
        for topology in TOPOLOGIES[chips]:
            kind = topology.split(":")[0]
            if kind not in asked.kinds:
                continue
            figures = compiled(topology, asked.kernels)
            gigabytes = {name: figures[name] / 1e9 for name in ("peak_bytes", "sent_bytes", "ideal_bytes")}
            print(topology, *(f"{name} {value:.2f} GB" for name, value in gigabytes.items()), flush=True)
            if asked.output is not None:
                facts = {
                    "model": "transformer_1b, FSDP, bfloat16, remat none", "kernels": asked.kernels,
                    "jax": jax.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
                }  # fmt: skip
                text = json.dumps(facts | figures, indent=2) + "\n"
                (asked.output / f"scaling_ahead_{kind}_{chips}.json").write_text(text)


if __name__ == "__main__":
    main()
