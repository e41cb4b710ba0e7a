"""What a sweep costs beside its runs: the same runs by hand, one after another, and by one `efficient-lm sweep`.

    python benchmarks/sweep.py --rounds 3 --output benchmarks/results/sweep_cpu.json

Both ways use one compile cache, filled by a first round that is not counted, and take turns. `overhead` is how much
longer the sweep took than the runs by hand, in parts of these; `before` is the sweep's time until its first run had
begun, in which it checks every arm (and compiles its step, found in the cache), and `beyond` the overhead without that.
`start` is a run's time from its command to its first step.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import command_line, save

KEYS = [
    "experiment=quickstart", "nesting=none", "tokenizer=bytes", "model.width=96", "model.repeats=3", "mixer.heads=4",
    "train.log_every=1", "train.evaluate_rows=16", "train.checkpoint_every=100", "train.evaluate_every=null",
]  # fmt: skip
MIXERS = ("attention", "gla")
COMMAND = (sys.executable, "-m", "efficient_lm")


def timed(*arguments: str) -> tuple[float, float]:
    """Wall time of a command's beginning, and seconds that it took."""
    began, start = time.time(), time.perf_counter()
    subprocess.run([*COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return began, time.perf_counter() - start


def sessions(run: Path) -> list[dict[str, Any]]:
    """What a run noted of its time; the first says when its process began."""
    return [json.loads(line) for line in (run / "sessions.jsonl").read_text().splitlines()]


def by_hand(folder: Path, rates: list[str], keys: list[str]) -> dict[str, Any]:
    """All runs, one after another."""
    seconds, starts = 0.0, []
    for mixer in MIXERS:
        for rate in rates:
            run = folder / f"{mixer}-{rate}"
            began, taken = timed("train", *keys, f"mixer={mixer}", f"optimizer.learning_rate={rate}", f"run.dir={run}")
            seconds += taken
            starts.append(next(row["time"] for row in sessions(run) if row["step"] >= 1) - began)
    return {"seconds": seconds, "start": statistics.median(starts)}


def by_sweep(folder: Path, rates: list[str], keys: list[str]) -> dict[str, Any]:
    """All runs, by one command."""
    axes = [f"mixer={','.join(MIXERS)}", f"optimizer.learning_rate={','.join(rates)}"]
    began, seconds = timed("sweep", *keys, *axes, f"dir={folder}")
    table = json.loads((folder / "table.json").read_text())["rows"]
    assert {row["state"] for row in table} == {"finished"}, table
    begun = min(sessions(folder / row["run"])[0]["time"] for row in table)
    return {"seconds": seconds, "before": begun - began}


def main() -> None:
    options = command_line(
        __doc__,
        runs={"type": int, "default": 4, "help": "learning rates of each of the two mixers"},
        steps={"type": int, "default": 100, "help": "of each run"},
    )
    rates = [f"{1e-3 * 1.5**place:.3g}" for place in range(options.runs)]
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        os.environ["EFFICIENT_LM_CACHE"] = str(Path(name) / "cache")
        keys = [*KEYS, f"train.steps={options.steps}"]
        for turn in range(min(options.rounds, 5) + 1):
            hand = by_hand(Path(name) / f"hand{turn}", rates, keys)
            swept = by_sweep(Path(name) / f"sweep{turn}", rates, keys)
            found = {
                "by_hand": round(hand["seconds"], 2),
                "by_sweep": round(swept["seconds"], 2),
                "overhead": round(swept["seconds"] / hand["seconds"] - 1, 4),
                "before": round(swept["before"], 2),
                "beyond": round((swept["seconds"] - swept["before"]) / hand["seconds"] - 1, 4),
                "start": round(hand["start"], 2),
            }
            print(json.dumps(found | ({} if turn else {"counted": False})), flush=True)
            rounds += [found] if turn else []
    medians = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    results = {"runs": len(MIXERS) * len(rates), "steps": options.steps, "median": medians, "rounds": rounds}
    print(json.dumps(medians))
    save(options.output, results)


if __name__ == "__main__":
    main()
