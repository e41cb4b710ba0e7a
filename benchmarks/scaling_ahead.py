"""What an FSDP step costs on pods: memory of a device, and bytes it sends, against what FSDP cannot do without.

    PYTHONPATH=.:.ahead python benchmarks/scaling_ahead.py [--chips 8 64 256] [--output benchmarks/results]

The step of `transformer_1b` with `parallelism=fsdp` is compiled for topologies of TPU v5p and of H200 that are not
there, with four rows on every device, as `efficient-lm plan` does; needs the packages of the extra `ahead`. The ideal:
every parameter gathered once in the forward and once in the backward pass, and its gradient scattered once, in
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

from efficient_lm.config import load_run_config
from efficient_lm.models.parameters import count_parameters
from efficient_lm.training.compiling import compiled_step, defined_for
from efficient_lm.training.machines import elsewhere
from kernels_pallas.ahead.collectives import totals

ROWS = 4
KEYS = ["experiment=transformer_1b", "data=sotu", "tokenizer=bytes", "parallelism=fsdp", "train.accumulate=1"]
TOPOLOGIES = {
    8: ("v5p:2x2x2", "h200:1x8"),
    64: ("v5p:4x4x4", "h200:8x8"),
    256: ("v5p:4x8x8", "h200:32x8"),
}


def compiled(topology: str, kernels: str) -> dict[str, Any]:
    """Figures of one step on all devices of a topology."""
    machine = elsewhere(topology)
    devices = len(machine.devices)
    config = load_run_config([*KEYS, f"train.batch_size={ROWS * devices}", f"train.kernels={kernels}"])
    defined = defined_for(config, machine)
    began = time.perf_counter()
    program = compiled_step(defined, machine)
    seconds = time.perf_counter() - began
    others, count = (devices - 1) / devices, count_parameters(defined.model.declarations)
    head = config.model.width * config.model.vocab_size
    sent, ideal = sum(each.moved for each in program.collectives), 6 * count * others
    return {
        "topology": topology,
        "devices": devices,
        "tokens_per_device": ROWS * config.train.sequence_length,
        "parameters": count,
        "peak_bytes": program.peak_bytes,
        "state_bytes": round(12 * count / devices),
        "sent_bytes": round(sent),
        "ideal_bytes": round(ideal),
        "ideal_bytes_head_once": round(ideal - 2 * head * others),
        "sent_over_ideal": round(sent / ideal, 4),
        "collectives": {
            kind: {name: round(value) for name, value in row.items()}
            for kind, row in totals(program.collectives).items()
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
