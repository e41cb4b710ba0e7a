"""The page of an evidence, from what its JSON file holds."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from efficient_lm.evidence.spec import EvidenceSpec, Expectation

Row = Mapping[str, Any]
"""An arm at a point of the grid: `arm`, the point's keys, `learning_rate`, `tried` and `runs` (see `gather`)."""


def page(
    title: str, name: str, evidence: EvidenceSpec, rows: Sequence[Row], facts: Mapping[str, Any], picture: str | None
) -> str:
    """The results as Markdown, `picture` the name of a file beside it."""
    tried = {id(run): run for row in rows for run in [*row["tried"], *row["runs"]]}
    total = sum(run.get("seconds", 0) for run in tried.values())
    where = ", ".join([facts["cpu"], facts["device"], *(f"{key} {value}" for key, value in facts["versions"].items())])
    seeds = ", ".join(map(str, evidence.seeds))
    rates = ", ".join(f"{rate:g}" for rate in evidence.learning_rates)
    swept = f" Learning rates tried with the first seed: {rates}." if rates else ""
    lines = [
        f"# {title}", "", evidence.question, "",
        f"`python scripts/evidence.py {name}`, measured {facts['date'][:10]}: {total / 60:.1f} minutes for "
        f"{len(tried)} runs, their wall times added up, on {where}. Seeds {seeds}: figures are means, with the "
        f"range in parentheses, of {evidence.measure.about}; seconds are those of the runs in the row.{swept}",
        "", *_table(evidence, rows), "", *verdicts(evidence, rows),
        *(["", f"![{title}]({picture})"] if picture else []),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _table(evidence: EvidenceSpec, rows: Sequence[Row]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for run in _good(row) for name in run["figures"]))
    head = ["arm", *evidence.grid, "parameters", "learning rate", "steps", *names, "seconds"]
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join(["---"] * len(head)) + " |"
    for row in rows:
        good = _good(row)
        cells = [row["arm"], *(f"{row[key]}" for key in evidence.grid)]
        if good:
            cells += [f"{good[0]['parameters']:,}", f"{row['learning_rate']:g}", _span([run["steps"] for run in good])]
            cells += [_spread([run["figures"][name] for run in good if name in run["figures"]]) for name in names]
        else:
            cells += ["failed", *[""] * (2 + len(names))]
        yield "| " + " | ".join([*cells, f"{sum(run.get('seconds', 0) for run in good):,.0f}"]) + " |"


def verdicts(evidence: EvidenceSpec, rows: Sequence[Row]) -> Iterator[str]:
    """What was expected, and whether it came true, a line each; at every point of the grid."""
    for expected in evidence.expect:
        for row in (row for row in rows if row["arm"] == expected.arm):
            point = {key: row[key] for key in evidence.grid}
            found = _compared(expected, row, [other for other in rows if all(other[k] == point[k] for k in point)])
            yield _verdict(expected, point, found)


def _verdict(expected: Expectation, point: Mapping[str, Any], found: Sequence[float]) -> str:
    """The mean decides; with several seeds it is said in how many of them the bounds hold too."""
    bounds = {name: getattr(expected, name) for name in ("at_least", "at_most") if getattr(expected, name) is not None}

    def holds(value: float) -> bool:
        return all(value >= bound if name == "at_least" else value <= bound for name, bound in bounds.items())

    wanted = " and ".join(f"{name.replace('_', ' ')} {bound:g}" for name, bound in bounds.items())
    words = {"over": expected.over, "minus": expected.minus}
    beside = "".join(f" {word} that of {arm}" for word, arm in words.items() if arm is not None)
    where = "".join(f", {key}={value}" for key, value in point.items())
    said = f"- {expected.arm}{where}, {expected.figure}{beside}: {wanted} expected"
    if not found:
        return f"{said}, and not measured."
    verdict = "as expected" if holds(statistics.fmean(found)) else "not reproduced at this scale"
    seeds = f" (in {sum(map(holds, found))} of {len(found)} seeds)" if len(found) > 1 else ""
    return f"{said}, {_spread(found)} measured: {verdict}{seeds}."


def _compared(expected: Expectation, row: Row, rows: Sequence[Row]) -> list[float]:
    """Of each seed, the figure, or the figure beside the other arm's."""
    own = _by_seed(row, expected.figure)
    if expected.over is None and expected.minus is None:
        return [*own.values()]
    name = expected.over or expected.minus
    others = _by_seed(next((other for other in rows if other["arm"] == name), {"runs": ()}), expected.figure)
    pairs = [(own[seed], others[seed]) for seed in own if seed in others]
    return [one / other if expected.over else one - other for one, other in pairs]


def _by_seed(row: Row, figure: str) -> dict[int, float]:
    return {run["seed"]: run["figures"][figure] for run in _good(row) if figure in run["figures"]}


def _good(row: Row) -> list[Mapping[str, Any]]:
    return [run for run in row["runs"] if "error" not in run]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _span(values: Sequence[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"
