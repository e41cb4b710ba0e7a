"""Interleaved timing of alternatives in one process, and the facts that make a figure worth keeping."""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from efficient_lm.runtime import processor
from efficient_lm.runtime import surroundings as surroundings


def race(functions: Mapping[str, Callable], arguments: tuple, rounds: int) -> dict[str, dict[str, float]]:
    """Compile every function for the arguments, then time them in turn; the first one is what ratios refer to.

    Returns for each the median and the least milliseconds; the median milliseconds of processor time, all cores added,
    which a shared machine disturbs least; the ratio of its median to the first one's; and the temporary memory of the
    compiled program in MiB.
    """
    compiled = {name: jax.jit(function).lower(*arguments).compile() for name, function in functions.items()}
    times, work = ({name: [] for name in compiled} for _ in range(2))
    for turn in range(rounds + 2):
        for name, program in compiled.items():
            start, worked = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*arguments))
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
                work[name].append(1e3 * (time.process_time() - worked))
    first = statistics.median(next(iter(times.values())))
    return {
        name: {
            "median_ms": round(statistics.median(taken), 3),
            "least_ms": round(min(taken), 3),
            "processor_ms": round(statistics.median(work[name]), 3),
            "ratio": round(statistics.median(taken) / first, 3),
            "temporary_mib": round(compiled[name].memory_analysis().temp_size_in_bytes / 2**20, 1),
        }
        for name, taken in times.items()
    }


def report(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print one race as a table."""
    print(f"\n{title}\n{'':32}{'median ms':>11}{'least ms':>11}{'cpu ms':>11}{'ratio':>8}{'temp MiB':>10}")
    for name, row in rows.items():
        times = "".join(f"{row[key]:11.2f}" for key in ("median_ms", "least_ms", "processor_ms"))
        numbers = f"{times}{row['ratio']:8.2f}{row['temporary_mib']:10.1f}"
        print(f"{name:32}{numbers}", flush=True)


def machine() -> dict[str, object]:
    """Device, processor, versions and date of the figures."""
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def command_line(description: str, **options: Mapping[str, object]) -> argparse.Namespace:
    """`--rounds N`, `--output FILE`, and one more per keyword, whose value is what `add_argument` takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=20, help="timings of each alternative")
    parser.add_argument(
        "--output", type=Path, help="where to write the figures as JSON, e.g. benchmarks/results/x.json"
    )
    for name, keywords in options.items():
        parser.add_argument(f"--{name}", **keywords)
    return parser.parse_args()


def save(path: Path | None, results: Mapping[str, object]) -> None:
    """Write machine and results as JSON, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
