"""How good the models inside an elastic one are, beside models that were trained by themselves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.evidence.measures.base import Figures, MeasureSpec
from efficient_lm.spec import Count, Natural

if TYPE_CHECKING:
    from efficient_lm.api import Model
    from efficient_lm.elastic.nested import Nested

WHOLE = "1"
NEAR = 0.01
"""How far from the line between uniform sizes a mix may be to count as on it, as a part of its loss."""


class SizesSpec(MeasureSpec):
    """Bits per byte by size; whether layers of different widths do as well as their sizes promise; and how often a
    draft of each size would be accepted (MatFormer, Devvrit et al. 2024).

    Figures are named by the size, as a part of the nested arm's model. A run whose model is elastic has one for each of
    the models inside, trained to be used by themselves or not; any other has one, of the size whose parameters it has.

    - ``0.5``: bits per byte.
    - ``draft 0.5``: the share of drafted tokens that speculative sampling accepts, ``sum(min(p, q))`` (Leviathan et al.
      2023, section 3), at every place of validation rows; the nested arm's whole model verifies.
    - ``mixes near``: of the nested arm's Mix'n'Match models, whose lower layers have one width and upper ones the next,
      the share whose loss is at most 1 % above the line between the uniform models beside them; ``mixes near of any
      growth``: of all whose width grows with depth; ``random mixes near``: of widths drawn at random.
    - ``worst mix``: the largest loss of a model whose width grows with depth over that of the next smaller uniform one.

    Attributes:
        nested: the arm that is trained to have models inside.
        limit: windows of the validation text that bits per byte are of; None takes all.
        rows: of validation data, on which mixes and drafts are scored.
        random: how many mixes of any widths.
    """

    about = "bits per byte of the validation text, by size, and shares"
    kind: Literal["sizes"] = "sizes"
    nested: str
    limit: Count | None = None
    rows: Count = 64
    random: Natural = 20

    @property
    def reads(self) -> str:
        return self.nested

    def quality(self, figures: Mapping[str, float]) -> float:
        return -figures[max(filter(_is_size, figures), key=float)]

    def measure(self, run: Path, other: Path | None) -> tuple[Figures, dict[str, Any]]:
        from efficient_lm.api import load
        from efficient_lm.elastic.nested import nested_models
        from efficient_lm.models.parameters import count_parameters

        model = load(run)
        whole = model if other is None else load(other)
        inside = {count_parameters(each.model.declarations): each for each in nested_models(whole.model)}
        parts = [model] if model.config.model.elastic is None else [_part(model, each) for each in inside.values()]
        batch = whole.validation_rows(None, None, self.rows)
        figures, sizes = {}, []
        for part in parts:
            parameters = count_parameters(part.model.declarations)
            if parameters not in inside:
                counts = ", ".join(f"{count:,}" for count in inside)
                raise ConfigError(f"{run}: has {parameters:,} parameters, and the models inside {self.nested} {counts}")
            name = inside[parameters].name
            figures[name] = part.evaluate(limit=self.limit)["bits_per_byte"]
            sizes.append({"size": name, "parameters": parameters, "bits_per_byte": figures[name]})
        if other is None or model.config.model.elastic is None:
            figures |= {f"draft {size['size']}": _acceptance(whole, part, batch)
                        for size, part in zip(sizes, parts, strict=True) if size["size"] != WHOLE}  # fmt: skip
        if other is not None:
            return figures, {"sizes": sizes}
        mixes = _mixes(model, batch, run, self.random)
        return figures | figures_of(mixes), {"sizes": sizes, "mixes": mixes}

    @property
    def picture(self) -> Callable[[Sequence[Mapping[str, Any]], Path, str], Path]:
        return lambda rows, path, title: _draw(rows, path, title, self.nested)


def _is_size(name: str) -> bool:
    return name.replace(".", "", 1).isdigit()


def _part(model: "Model", each: "Nested") -> "Model":
    return model if each.is_whole else model.submodel(each.parts)


def _acceptance(whole: "Model", draft: "Model", batch: Mapping[str, np.ndarray]) -> float:
    from efficient_lm.evaluation.distributions import acceptance

    return acceptance((whole.model, whole.params), (draft.model, draft.params), batch, whole.dtype)


def _mixes(model: "Model", batch: Mapping[str, np.ndarray], folder: Path, random: int) -> list[dict[str, Any]]:
    """Of every uniform model and every mix: its `kind`, `parameters`, `loss`, and for mixes `line`, the loss that its
    parameters promise, and `below`, the loss of the next smaller uniform model."""
    from efficient_lm.elastic.budget import Meter
    from efficient_lm.elastic.search.base import Space
    from efficient_lm.elastic.search.scoring import Scorer

    space = Space.of(model.model, Meter(model.config.train.sequence_length, model.dtype, latency=False))
    scorer = Scorer(space, model.params, batch, "loss", folder, model.dtype)
    rows = []
    for kind, levels in choices(len(space.nested), space.layers, random):
        parameters = int(space.costs.of(levels)["params"])
        rows.append({"kind": kind, "levels": levels, "parameters": parameters, "loss": scorer(levels)})
    scorer.close()
    uniform = sorted((row["parameters"], row["loss"]) for row in rows if row["kind"] == "uniform")
    counts, losses = zip(*uniform, strict=True)
    for row in rows:
        if row["kind"] != "uniform":
            row["line"] = float(np.interp(row["parameters"], counts, losses))
            row["below"] = losses[int(np.searchsorted(counts, row["parameters"], side="right")) - 1]
    return rows


def choices(levels: int, layers: int, random: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Which widths layers have, each choice once: uniform, Mix'n'Match, any that grow with depth, and random ones."""
    seen = {(level,) * layers for level in range(levels)}
    yield from (("uniform", choice) for choice in sorted(seen))
    for choice in combinations_with_replacement(range(levels), layers):
        if choice not in seen:
            seen.add(choice)
            neighbours = choice[-1] - choice[0] == 1
            yield ("mix" if neighbours else "growth"), choice
    drawn = np.random.default_rng(0)
    for _ in range(min(random, levels**layers - len(seen))):
        choice = next(iter(found for found in _draws(drawn, levels, layers) if found not in seen))
        seen.add(choice)
        yield "random", choice


def _draws(random: np.random.Generator, levels: int, layers: int) -> Iterator[tuple[int, ...]]:
    while True:
        yield tuple(int(level) for level in random.integers(levels, size=layers))


def figures_of(mixes: Sequence[Mapping[str, Any]]) -> Figures:
    """What `SizesSpec` says of mixes: rows of `kind` and `loss`, and unless they are uniform `line` and `below`."""

    def near(kinds: set[str]) -> float:
        return float(np.mean([row["loss"] <= (1 + NEAR) * row["line"] for row in mixes if row["kind"] in kinds]))

    figures = {"mixes near": near({"mix"}), "mixes near of any growth": near({"mix", "growth"})}
    figures["worst mix"] = max(row["loss"] / row["below"] for row in mixes if row["kind"] in ("mix", "growth"))
    if any(row["kind"] == "random" for row in mixes):
        figures["random mixes near"] = near({"random"})
    return figures


def _draw(rows: Sequence[Mapping[str, Any]], path: Path, title: str, nested: str) -> Path:
    """Bits per byte over parameters: models inside the nested arm, inside any other elastic arm, and those trained by
    themselves; each seed a point, lines through the means."""
    from efficient_lm.training.reporting import empty_plot, save_plot

    axes = empty_plot("parameters, millions", "validation bits per byte", title)
    alone: dict[int, list[float]] = {}
    for row in rows:
        found: dict[int, list[float]] = {}
        for run in (run for run in row["runs"] if "error" not in run):
            for size in run["sizes"]:
                found.setdefault(size["parameters"], []).append(size["bits_per_byte"])
        if found and (len(found) == 1 or row["arm"] != nested):
            alone[max(found)] = found[max(found)]
        if len(found) > 1:
            name = (
                "nested: models inside one"
                if row["arm"] == nested
                else f"{row['arm']}: slices of a model trained plainly"
            )
            _curve(axes, found, name, "#4c72b0" if row["arm"] == nested else "#c44e52")
    _curve(axes, alone, "trained by themselves", "#dd8452")
    axes.legend(frameon=False)
    return save_plot(axes, path)


def _curve(axes: Any, found: Mapping[int, Sequence[float]], label: str, color: str) -> None:
    counts = sorted(found)
    millions = [count / 1e6 for count in counts]
    axes.plot(millions, [np.mean(found[count]) for count in counts], color=color, linewidth=1.6, label=label)
    for count, across in zip(counts, millions, strict=True):
        axes.plot([across] * len(found[count]), found[count], color=color, marker="o", markersize=4, linestyle="none")
