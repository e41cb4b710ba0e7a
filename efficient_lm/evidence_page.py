"""The page of an evidence, from what its JSON file holds."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
"""An arm at a point of the grid: `arm`, the point's keys, `learning_rate`, `tried` and `runs` (see `evidence`)."""


def page(name: str, evidence: Mapping[str, Any], rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lengths = sorted({cell["length"] for row in rows for run in row["runs"] for cell in run.get("lengths", ())})
    head = [
        "arm",
        *evidence["grid"],
        "parameters",
        "learning rate",
        "steps",
        *(f"length {length}" for length in lengths),
    ]
    table = [[*head, "seconds"], ["---"] * (len(head) + 1)]
    for row in rows:
        good = [run for run in row["runs"] if "error" not in run]
        cells = [row["arm"], *(f"{row[key]}" for key in evidence["grid"])]
        if good:
            cells += [f"{good[0]['parameters']:,}", f"{row['learning_rate']:g}", _span([run["steps"] for run in good])]
            cells += [_spread(accuracies(row, length)) for length in lengths]
        else:
            cells += ["failed", *[""] * (2 + len(lengths))]
        table.append([*cells, f"{sum(run.get('seconds', 0) for run in good):,.0f}"])
    tried = {id(run): run for row in rows for run in [*row["tried"], *row["runs"]]}
    total = sum(run.get("seconds", 0) for run in tried.values())
    where = ", ".join([facts["cpu"], facts["device"], *(f"{key} {value}" for key, value in facts["versions"].items())])
    seeds = ", ".join(map(str, evidence["seeds"]))
    rates = ", ".join(f"{rate:g}" for rate in evidence["learning_rates"])
    swept = f" Learning rates tried with the first seed: {rates}." if rates else ""
    lines = [
        f"# {name.replace('_', ' ').capitalize()}", "", evidence["question"], "",
        f"`python scripts/evidence.py {name}`, measured {facts['date'][:10]}: {total / 60:.1f} minutes for "
        f"{len(tried)} runs, their wall times added up, on {where}. Seeds {seeds}: accuracy is the mean, with the "
        f"range in parentheses, of answers that are right; seconds are those of the runs in the row.{swept}",
        "", *("| " + " | ".join(cells) + " |" for cells in table), "", *verdicts(evidence, rows),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def verdicts(evidence: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """What was expected, and whether it came true, a line each; at every point of the grid."""
    for expected in evidence["expect"]:
        for row in rows:
            found = accuracies(row, expected["length"]) if row["arm"] == expected["arm"] else []
            if found:
                mean = statistics.fmean(found)
                bounds = [(name, expected[name]) for name in ("at_least", "at_most") if expected[name] is not None]
                wanted = " and ".join(f"{name.replace('_', ' ')} {bound:g}" for name, bound in bounds)
                holds = all(mean >= bound if name == "at_least" else mean <= bound for name, bound in bounds)
                where = "" if expected["length"] is None else f" at length {expected['length']}"
                point = "".join(f", {key}={row[key]}" for key in evidence["grid"])
                verdict = "as expected" if holds else "not reproduced at this scale"
                yield f"- {expected['arm']}{point}{where}: {wanted} expected, {mean:.3f} measured: {verdict}."


def accuracies(row: Row, length: int | None) -> list[float]:
    """Of each run of a row that did not fail: accuracy at a length, or on validation rows for None."""
    good = [run for run in row["runs"] if "error" not in run]
    if length is None:
        return [run["accuracy"] for run in good]
    return [cell["accuracy"] for run in good for cell in run["lengths"] if cell["length"] == length]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _span(values: Sequence[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"
