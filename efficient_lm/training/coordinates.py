"""The coordinate check: whether activations stay of one size as a model gets wider, while it learns.

The same model is trained for a few steps at several widths, and the mean absolute values of its activations are held
against the width (Yang et al. 2022, arXiv 2203.03466, appendix D.1 and figure 5). Where a parametrization is right,
what a few steps change in them does not depend on the width: the slope of its logarithm over that of the width is about
zero.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from efficient_lm.config import Name, RunConfig
from efficient_lm.models.context import Context
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import Parameters
from efficient_lm.models.traversal import Passage, Runs, Traversal
from efficient_lm.spec import Count, Listing, Positive, Spec
from efficient_lm.training.portions import trained_on
from efficient_lm.training.reporting import empty_plot, save_plot, write_json_atomically
from efficient_lm.training.schedules import ConstantSpec
from efficient_lm.training.setup import prepare
from kernels_pallas.dispatch import preferring

MEASURES = ("size", "change")
"""Of activations: their mean absolute value, and that of what training has changed in them."""


class CoordinateCheckSpec(Spec):
    """A coordinate check.

    Attributes:
        widths: `model.width` of each model, at least two.
        steps: of the optimizer, at the full learning rate.
        seeds: models of each width, whose measures are averaged.
        tolerance: slope of a change above which activations grow.
        output: folder for `coordinates.json` and `coordinates.png`.
    """

    widths: Annotated[Listing[Count], Field(min_length=2)]
    steps: Count = 3
    seeds: Count = 1
    tolerance: Positive = 0.3
    output: Name


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        widths: of the models.
        values: by measure and activation, float64 ``[steps + 1, widths]``.
    """

    widths: tuple[int, ...]
    values: dict[str, dict[str, np.ndarray]]

    def slopes(self, measure: str) -> dict[str, list[float | None]]:
        """By activation, the slope behind each step of ``log(measure)`` over ``log(width)``; None of zeros."""
        across = np.log(self.widths)
        return {
            name: [float(np.polyfit(across, np.log(row), 1)[0]) if (row > 0).all() else None for row in values]
            for name, values in self.values[measure].items()
        }

    def growing(self, tolerance: float) -> dict[str, float]:
        """Activations whose change grows with the width, each with its steepest slope."""
        steepest = {name: max(slope or 0.0 for slope in slopes) for name, slopes in self.slopes("change").items()}
        return {name: slope for name, slope in steepest.items() if slope > tolerance or math.isnan(slope)}


def check_coordinates(spec: CoordinateCheckSpec, configs: Sequence[RunConfig]) -> Measured:
    """Train a model of each config, which differ in their width alone, and measure it.

    Raises:
        ConfigError, DataError: of a config, before any training of it.
    """
    runs = [[measured(_seeded(config, seed), spec.steps) for seed in range(spec.seeds)] for config in configs]
    values = {
        measure: {
            name: np.mean([[run[measure][name] for run in seeds] for seeds in runs], axis=1).T
            for name in runs[0][0][measure]
        }
        for measure in MEASURES
    }
    return Measured(tuple(config.model.width for config in configs), values)


def _seeded(config: RunConfig, seed: int) -> RunConfig:
    run = config.run.model_copy(update={"seed": config.run.seed + seed})
    return config.model_copy(update={"run": run, "schedule": ConstantSpec(warmup=0)})


def measured(config: RunConfig, steps: int) -> dict[str, dict[str, list[float]]]:
    """By measure and activation, its values on the first batch, before training and behind each step."""
    setup = prepare(config)
    with setup.layout.active(), preferring(config.train.kernels):
        state, batches = setup.fresh_state(), setup.portions.batches(setup.data)
        look = jax.jit(activations(setup.model))
        given = [setup.layout.batch(trained_on(batch)) for batch in islice(batches, steps)]
        found = [jax.device_get(look(state["parameters"], given[0]))]
        for batch in given:
            state, _ = setup.step(state, batch)
            found.append(jax.device_get(look(state["parameters"], given[0])))
    return {
        "size": {name: [_mean(each[name]) for each in found] for name in found[0]},
        "change": {name: [_mean(each[name] - found[0][name]) for each in found] for name in found[0]},
    }


def _mean(values: np.ndarray) -> float:
    return float(np.mean(np.abs(values), dtype=np.float64))


class _Collect(Traversal):
    """Keeps the residual stream behind every layer: ``[layers, ...]``."""

    def __init__(self, layers: int):
        self.tables = jnp.arange(layers)

    def start(self, x: jax.Array) -> jax.Array:
        return jnp.zeros((len(self.tables), *x.shape), jnp.float32)

    def watch(self, state: jax.Array, table: jax.Array, passage: Passage, runs: Runs | None, context: Context) -> Any:
        return jax.lax.dynamic_update_index_in_dim(state, passage.after.astype(jnp.float32), table, 0)


def activations(model: LanguageModel) -> Callable[[Parameters, dict[str, jax.Array]], dict[str, jax.Array]]:
    """``(parameters, batch) -> {"embedding", "layer 0", ..., "logits"}``, float32; streams ``[..., time, width]``."""

    def look(params: Parameters, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        context = Context(batch["positions"], batch["segment_ids"])
        x, context, _ = model.entered(params, batch["tokens"], context)
        after, _, _, layers = model.stack(params["stack"], x, context, None, _Collect(len(model.layers)))
        found = {"embedding": x.astype(jnp.float32)}
        found |= {f"layer {number}": layers[number] for number in range(len(model.layers))}
        return found | {"logits": model.logits_from(params, model.normed(params, after))}

    return look


def table(found: Measured) -> str:
    """Slopes behind the last step, and the sizes there at every width, as text."""
    size, change = found.slopes("size"), found.slopes("change")
    head = ["activation", "slope of size", "slope of change", *(f"change at {width}" for width in found.widths)]
    rows = [
        [name, _shown(size[name][-1]), _shown(change[name][-1]), *(f"{value:.3g}" for value in values[-1])]
        for name, values in found.values["change"].items()
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def _shown(slope: float | None) -> str:
    return "-" if slope is None else f"{slope:+.2f}"


def write(found: Measured, spec: CoordinateCheckSpec, title: str) -> Path:
    """Write `coordinates.json` and `coordinates.png`; the folder they are in."""
    folder = Path(spec.output)
    folder.mkdir(parents=True, exist_ok=True)
    values = {m: {name: rows.tolist() for name, rows in each.items()} for m, each in found.values.items()}
    slopes = {measure: found.slopes(measure) for measure in MEASURES}
    growing = found.growing(spec.tolerance)
    content = {"title": title, "widths": list(found.widths), "steps": spec.steps, "tolerance": spec.tolerance}
    content |= {"stays": not growing, "growing": growing, "slopes": slopes, "values": values}
    write_json_atomically(folder / "coordinates.json", content)
    axes = empty_plot("width", f"mean |change| after {spec.steps} steps", title)
    for name, rows in found.values["change"].items():
        axes.loglog(found.widths, rows[-1], marker="o", markersize=4, label=name)
    axes.set_xticks(found.widths, [str(width) for width in found.widths])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    save_plot(axes, folder / "coordinates.png")
    return folder
