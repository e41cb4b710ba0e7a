"""What a sweep costs beside its runs: the same runs by hand, one after another, and by one `efficient-lm sweep`.

    python benchmarks/sweep.py --rounds 3 --output benchmarks/results/sweep_cpu.json

Both ways use one compile cache, filled by a sweep before, and take turns. `before` is the time until
the sweep's first run was born, in which it checks every arm (and compiles its step, found in the cache); `between` its
further time in which no run was alive, in parts of the lives of its runs. `beyond` is how much longer the sweep took
than `before` and the runs by hand, in parts of these: it also has what the sweep takes from its runs, and the noise of
the machine between the two. `start` is a run's time from its command to its first step.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
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


class Lives:
    """When the runs of a sweep were first and last seen alive, in looks twenty times a second."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Lives":
        self._thread.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def born(self) -> float:
        """When the first was."""
        return min(first for first, _ in self._seen.values())

    @property
    def seconds(self) -> float:
        """Sum of the lives of runs, one of which lives at a time."""
        return sum(last - first for first, last in self._seen.values())

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "train" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                        first, _ = self._seen.get(process.pid, (time.time(), 0))
                        self._seen[process.pid] = (first, time.time())


def by_sweep(folder: Path, rates: list[str], keys: list[str]) -> dict[str, Any]:
    """All runs, by one command."""
    axes = [f"mixer={','.join(MIXERS)}", f"optimizer.learning_rate={','.join(rates)}"]
    with Lives() as lives:
        began, seconds = timed("sweep", *keys, *axes, f"dir={folder}")
    table = json.loads((folder / "table.json").read_text())["rows"]
    assert {row["state"] for row in table} == {"finished"}, table
    return {"seconds": seconds, "before": lives.born - began, "lives": lives.seconds}


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
        by_sweep(Path(name) / "first", rates, keys)
        for turn in range(min(options.rounds, 5)):
            hand = by_hand(Path(name) / f"hand{turn}", rates, keys)
            swept = by_sweep(Path(name) / f"sweep{turn}", rates, keys)
            found = {
                "by_hand": round(hand["seconds"], 2),
                "by_sweep": round(swept["seconds"], 2),
                "before": round(swept["before"], 2),
                "between": round((swept["seconds"] - swept["before"]) / swept["lives"] - 1, 4),
                "beyond": round((swept["seconds"] - swept["before"]) / hand["seconds"] - 1, 4),
                "start": round(hand["start"], 2),
            }
            print(json.dumps(found), flush=True)
            rounds.append(found)
    medians = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    results = {"runs": len(MIXERS) * len(rates), "steps": options.steps, "median": medians, "rounds": rounds}
    print(json.dumps(medians))
    save(options.output, results)


if __name__ == "__main__":
    main()
