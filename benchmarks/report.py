"""How long a report of many runs takes, and how large its page is.

    python benchmarks/report.py --runs 200 --rows 1000 --output benchmarks/results/report_cpu.json
    python benchmarks/report.py --keep made_up             # leave the made-up sweep and its report there, to look at

A sweep of made-up runs is written first: 5 mixers × 2 channel mixers × 5 learning rates, and as many seeds as it takes,
each with the config that `train` would compose, so many rows of metrics, and a summary. What is timed is the command
from its start to its end, imports included, as `efficient-lm report` is called.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from timing import command_line, save

from efficient_lm.config import load_run_config
from efficient_lm.untrusted import to_yaml

MIXERS = {"attention": 3.32, "mamba2": 3.36, "gla": 3.41, "gated_delta_net": 3.30, "linear_attention": 3.62}
FFNS = {"swiglu": 0.0, "moe": -0.05}
RATES = {3e-4: 0.25, 1e-3: 0.07, 3e-3: 0.0, 1e-2: 0.06, 3e-2: 0.4}
"""Made-up losses: of a mixer, what a channel mixer adds to it, and what a learning rate."""
TOKENS = 2048
"""Of a step."""


def made_sweep(folder: Path, runs: int, rows: int) -> None:
    """Write a sweep of that many runs, with so many rows of metrics each."""
    random = np.random.default_rng(0)
    arms = [(mixer, ffn) for mixer in MIXERS for ffn in FFNS]
    configs = {arm: load_run_config([f"mixer={arm[0]}", f"ffn={arm[1]}"]).dump() for arm in arms}
    table = []
    for number in range(runs):
        seed, place = divmod(number, len(arms) * len(RATES))
        arm, rate = arms[place // len(RATES)], list(RATES)[place % len(RATES)]
        name = f"{arm[0]}-{arm[1]}-lr{rate:g}-seed{seed}"
        directory = folder / "runs" / name
        directory.mkdir(parents=True)
        config = json.loads(json.dumps(configs[arm]))
        config["optimizer"]["learning_rate"] = rate
        config["run"] |= {"name": name, "dir": str(directory), "seed": seed}
        (directory / "config.yaml").write_text(to_yaml(config))
        end = MIXERS[arm[0]] + FFNS[arm[1]] + RATES[rate] + random.normal(0, 0.012)
        summary = made_rows(directory, rows, end, 1 + 0.4 * arms.index(arm) / len(arms), random)
        (directory / "summary.json").write_text(json.dumps(summary, indent=2))
        choices = {"mixer": arm[0], "ffn": arm[1], "optimizer.learning_rate": rate}
        figures = {figure: summary[figure] for figure in ("val_loss", "cache_bytes")}
        table.append({"name": name, "choices": choices, "seed": seed, "state": "finished", "run": f"runs/{name}",
                      "figures": figures, "reason": None})  # fmt: skip
    (folder / "table.json").write_text(json.dumps({"rows": table}, indent=2))


def made_rows(directory: Path, rows: int, end: float, slowness: float, random: np.random.Generator) -> dict[str, Any]:
    """Write `metrics.jsonl`, with an evaluation after every tenth of the rows; gives back the summary."""
    every, lines = 10, []
    loss = end
    for row in range(1, rows + 1):
        step = row * every
        loss = end + (8.3 - end) * math.exp(-4.5 * row / rows) * (1 + row) ** -0.35
        done = {"step": step, "tokens": step * TOKENS, "loss": loss + random.normal(0, 0.05), "accuracy": 0.2,
                "grad_norm": abs(random.normal(1, 0.2)), "learning_rate": 1e-3, "seconds": 0.21 * slowness * step,
                "tokens_per_second": TOKENS / 0.2 / slowness, "step_seconds": 0.2 * slowness, "data_wait": 0.002,
                "dispatch": 0.001, "metrics_wait": 0.93, "host_memory_bytes": 1.2e9}  # fmt: skip
        lines.append(json.dumps(done))
        if row % max(rows // 10, 1) == 0:
            score = {"step": step, "tokens": step * TOKENS, "val_loss": loss + 0.03, "val_bits_per_byte": loss / 2.6}
            lines.append(json.dumps(score))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    steps = rows * every
    spent = {"step": steps, "tokens": steps * TOKENS, "seconds": 0.21 * slowness * steps}
    sizes = {"parameters": int(3.4e6 * slowness), "cache_bytes": int(4e5 * slowness**6)}
    scores = {"val_loss": loss + 0.02, "val_bits_per_byte": loss / 2.61}
    return {"run": str(directory), **spent, **sizes, **scores, "training_flops": 2.1e7 * slowness * steps * TOKENS}


def measured(sweep: Path, rounds: int) -> dict[str, Any]:
    """Seconds of the whole command, of each round, and what it wrote."""
    taken = []
    for _ in range(rounds):
        shutil.rmtree(sweep / "report", ignore_errors=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "efficient_lm", "report", f"runs={sweep}"], check=True)
        taken.append(round(time.perf_counter() - start, 3))
    files = sorted((sweep / "report").iterdir())
    return {"seconds": taken, "bytes": {file.name: file.stat().st_size for file in files}}


def main() -> None:
    options = command_line(
        __doc__,
        runs={"type": int, "default": 200, "help": "runs of the sweep"},
        rows={"type": int, "default": 1000, "help": "rows of metrics of each run"},
        keep={"type": Path, "help": "a folder for the sweep, which is left there"},
    )
    with tempfile.TemporaryDirectory() as folder:
        sweep = options.keep or Path(folder) / "sweep"
        made_sweep(sweep, options.runs, options.rows)
        found = measured(sweep, min(options.rounds, 5))
    results = {"runs": options.runs, "rows": options.rows, **found}
    print(json.dumps(results, indent=2))
    save(options.output, results)


if __name__ == "__main__":
    main()
