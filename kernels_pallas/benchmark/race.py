"""One race: every peer that can run a case, checked and then timed in turn, as rows of a table."""

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.benchmark import forms, gate, peers, timing
from kernels_pallas.benchmark.cases import Case
from kernels_pallas.benchmark.ceilings import ceiling

Row = dict[str, Any]


def race(case: Case, names: Iterable[str], training: bool, rounds: int) -> list[Row]:
    """Rows of a case, forward or forward and backward: times, achieved rates and shares of the chip's ceiling.

    A peer that cannot run, or computes something else, has a row that says so and no time.
    """
    arrays, rows = case.inputs(), []
    wanted = None
    for name in (name for name in names if peers.serves(name, case)):
        row: Row = {"case": case.name, "pass": "forward and backward" if training else "forward", "peer": name}
        try:
            if name in peers.OWN:
                row |= _own(case, name, training, rounds, arrays)
            elif not peers.installed(name):
                row["why"] = f"{peers.OTHERS[name]} is not installed"
            else:
                wanted = forms.compiled(case, "xla", False)(arrays) if wanted is None else wanted
                row |= _other(case, name, training, rounds, arrays, wanted)
        except (ValueError, RuntimeError, ImportError, AttributeError, TypeError) as error:
            row["why"] = str(error).splitlines()[0][:160]
        rows.append(row)
    return rows


def _own(case: Case, name: str, training: bool, rounds: int, arrays) -> Row:
    if faults := gate.wrong(case, name):
        return {"why": "wrong: " + "; ".join(faults)}
    return _timed(case, forms.compiled(case, name, training), training, rounds, arrays)


def _timed(case: Case, run, training: bool, rounds: int, arrays) -> Row:
    program = run.lower(arrays).compile()
    times = timing.measured(lambda: program(arrays), rounds)
    kernels = timing.kernel_milliseconds(program, (arrays,))
    row = _figures(case, training, times, kernels)
    return row | {"temporary_mib": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1)}


def _other(case: Case, name: str, training: bool, rounds: int, arrays, wanted) -> Row:
    """Another library's row; its outputs are compared with ours at full size, its gradients are taken on trust."""
    if name == "tokamax":
        function = peers.tokamax_form(case)
        got = jax.jit(function)(arrays)
    else:
        function, values = peers.torch_form(name, case), peers.tensors(arrays)
        got = function(values).detach().float().cpu().numpy()
    apart = gate.error(got, jax.tree.leaves(wanted)[0])
    if not apart <= gate.OUTPUT:
        return {"why": f"wrong: its outputs are off by {apart:.2g}"}
    if name == "tokamax":
        return _timed(case, jax.jit(forms.training(function) if training else function), training, rounds, arrays)
    run = peers.torch_training(function, values) if training else lambda: function(values)
    return _figures(case, training, timing.summary(peers.torch_milliseconds(run, rounds)), None)


def _figures(case: Case, training: bool, times: timing.Times, kernels: float | None) -> Row:
    """Rates are of the time of the kernels where that is known."""
    seconds = 1e-3 * (kernels or times.median)
    work = {"flops": case.flops(training), "bytes": case.bytes(training), "exponentials": case.exponentials(training)}
    row: Row = {"median_ms": times.median, "low_ms": times.low, "high_ms": times.high, "kernels_ms": kernels}
    row |= {"tflops_per_s": 1e-12 * work["flops"] / seconds, "gbytes_per_s": 1e-9 * work["bytes"] / seconds}
    most = ceiling(jax.devices()[0].device_kind)
    if most is not None:
        shares = {kind: work[kind] / seconds / peak for kind, peak in most._asdict().items() if peak}
        row |= {"bound_by": max(shares, key=shares.get), "of_ceiling": max(shares.values())}
    return row


def table(rows: Sequence[Row]) -> str:
    """Rows of one case as text; ratios are to the first that has a time."""
    lines = [f"{'':16}{'median ms':>11}{'spread':>17}{'TFLOP/s':>9}{'GB/s':>8}{'of ceiling':>18}{'ratio':>7}"]
    first = next((row["median_ms"] for row in rows if "median_ms" in row), None)
    for row in rows:
        if "median_ms" not in row:
            lines.append(f"{row['peer']:16}{row['why']}")
            continue
        spread = f"{row['low_ms']:.3f}-{row['high_ms']:.3f}"
        share = f"{row['of_ceiling']:.0%} of {row['bound_by']}" if "of_ceiling" in row else ""
        lines.append(
            f"{row['peer']:16}{row['median_ms']:11.3f}{spread:>17}{row['tflops_per_s']:9.1f}{row['gbytes_per_s']:8.0f}"
            f"{share:>18}{row['median_ms'] / first:7.2f}"
        )
    return "\n".join(lines)


def surroundings() -> Row:
    """Device, host and versions that figures belong to."""
    device = jax.devices()[0]
    versions = {}
    for name in ("jax", "jaxlib", "tokamax", "torch", "flash-linear-attention", "mamba-ssm", "causal-conv1d"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def device_name() -> str:
    """The device's name as a part of a file's."""
    return jax.devices()[0].device_kind.lower().replace(" ", "_")


def save(path: Path, op: str, rows: Sequence[Row]) -> None:
    """Write rows and what they belong to as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = [{key: _rounded(value) for key, value in row.items()} for row in rows]
    path.write_text(json.dumps({"machine": surroundings(), "operator": op, "rows": rounded}, indent=2) + "\n")


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
