"""The charts of a report, made of runs and arms."""

from collections.abc import Mapping, Sequence

from efficient_lm.pages.chart import HIGH, LOW, Chart, Column, Measure, Series
from efficient_lm.sweeps.report.arms import Arm, Arms, Setting, shown
from efficient_lm.sweeps.report.curves import envelope, listed, spent
from efficient_lm.sweeps.report.measures import COSTS, PROGRESS, QUALITY, TRAINING, VALIDATION
from efficient_lm.sweeps.report.runs import Run

Rows = Mapping[str, str]
"""What has a row in a table (a run's path, an arm's label) → the row's id."""
SAME = 1e-3
"""Relative difference up to which FLOPs of a token are those of one arm: rows may grow, and runs stop, on the way."""


def counted(number: int, what: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def seeds_of(settings: Sequence[Setting]) -> str:
    """How many seeds the figures are of, and what bars show."""
    counts = {sum(run.ended for run in setting.runs) for setting in settings} - {0}
    if not counts or max(counts) == 1:
        return "one seed each"
    span = f"{max(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"means of {span} seeds, with bars from the best to the worst"


def loss_chart(arms: Arms, rows: Rows) -> Chart:
    """Every run's losses along tokens, FLOPs and seconds."""
    series = []
    for arm in arms.arms:
        for run in arm.runs:
            for columns in (run.training, run.validation):
                found = _curve(columns, run)
                if len(next(iter(found.values()), ())):
                    alone = len(columns["tokens"]) < 12
                    series.append(_series(arms, arm, run, found, marks=alone, rows=rows))
    drawn = [run for arm in arms.arms for run in arm.runs if len(run.training) or len(run.validation)]
    unknown = [run for run in drawn if "training_flops_per_token" not in run.figures]
    alike = ""
    if len(arms.arms) < len(drawn):
        alike = ", those of one colour and dash alike in all but learning rate and seed"
    caption = (
        f"{counted(len(drawn), 'run')}, a line for each{alike}. The training loss is smoothed by an exponential "
        "average in both directions; validation is on the rows that are scored while training."
    )
    if unknown and len(unknown) < len(drawn):
        caption += f" Of {counted(len(unknown), 'run')} that left no summary FLOPs are not known."
    return Chart("losses", "Every run", caption, PROGRESS, (*TRAINING, *VALIDATION), series,
                 arms.legend, settle=True).reduced()  # fmt: skip


def _curve(columns: Mapping[str, Column], run: Run) -> dict[str, list[float | None]]:
    found = {name: listed(values) for name, values in columns.items()}
    flops = spent(columns, "flops", run.figures.get("training_flops_per_token"))
    return found | ({} if flops is None else {"flops": listed(flops)})


def _series(arms: Arms, arm: Arm, run: Run, columns: Mapping[str, Column], marks: bool, rows: Rows) -> Series:
    row = rows.get(str(run.path))
    return Series(f"{run.name}{_tuning(run)}", arms.group(arm), columns, marks=marks, rows=[row] if row else ())


def _tuning(run: Run) -> str:
    parts = [] if run.learning_rate is None else [f"learning rate {shown(run.learning_rate)}"]
    parts += [] if run.seed is None else [f"seed {run.seed}"]
    return f" ({', '.join(parts)})" if parts else ""


def envelope_chart(arms: Arms) -> Chart | None:
    """The best of the learning rates wherever training stops; None where no arm has several runs."""
    if all(len(arm.runs) == 1 for arm in arms.arms):
        return None
    series = [
        each
        for arm in arms.arms
        for measure in (*TRAINING, *VALIDATION)
        for along in ("tokens", "seconds")
        if (each := _envelope_series(arms, arm, measure, along)) is not None
    ]
    if not series:
        return None
    rates = max(len(arm.settings) for arm in arms.arms)
    seeds = max(len(setting.runs) for arm in arms.arms for setting in arm.settings)
    over, there = "all runs of each together", ""
    if rates > 1:
        over = f"at every place the best of up to {rates} learning rates, as if training had stopped there"
        there = " of the rate that is best there"
    mean = f" Lines are means of up to {seeds} seeds{there}, bands go from the best seed to the worst."
    caption = (
        f"{counted(len(arms.arms), 'arm')}: {over}.{mean if seeds > 1 else ''} Runs that did not end are left out; the "
        "training loss is smoothed."
    )
    title = "The best of each arm's learning rates" if rates > 1 else "Means over seeds"
    return Chart("envelopes", title, caption, PROGRESS, (*TRAINING, *VALIDATION), series, arms.legend,
                 settle=True).reduced()  # fmt: skip


def _envelope_series(arms: Arms, arm: Arm, measure: Measure, along: str) -> Series | None:
    found = envelope(arm, along, measure.name, measure.more)
    if found is None:
        return None
    columns = {along: listed(found.along), measure.name: listed(found.mean)}
    flops = [run.figures.get("training_flops_per_token") for run in arm.runs if run.ended]
    if along == "tokens" and None not in flops and max(flops) < (1 + SAME) * min(flops):
        columns["flops"] = listed(found.along * (sum(flops) / len(flops)))
    if (found.low < found.high).any():
        columns |= {measure.name + LOW: listed(found.low), measure.name + HIGH: listed(found.high)}
    labels = [arm.label + ("" if rate is None else f", learning rate {shown(rate)}") for rate in found.rates]
    alone = len(found.along) == 1
    return Series(arm.label, arms.group(arm), columns, strong=True, labels=labels, marks=alone)


def rate_chart(arms: Arms, rows: Rows) -> Chart | None:
    """Quality at the end against the learning rate; None where no arm has two."""
    tried = [arm for arm in arms.arms if len([each for each in arm.settings if each.rate and _known(each)]) > 1]
    if not tried:
        return None
    across = Measure("learning_rate", "learning rate", log=True)
    series = []
    for arm in tried:
        settings = [setting for setting in arm.settings if setting.rate and _known(setting)]
        columns: dict[str, Column] = {across.name: [setting.rate for setting in settings]}
        series.append(Series(arm.label, arms.group(arm), columns | _quality(settings), marks=True, rows=[
            rows.get(arm.label, "")] * len(settings)))  # fmt: skip
    settings = [setting for arm in tried for setting in arm.settings]
    caption = (
        f"{counted(len(tried), 'arm')} that tried several learning rates, and what each came to at its end: "
        f"{seeds_of(settings)}."
    )
    return Chart(
        "rates", "Quality against learning rate", caption, (across,), arms.quality, series, arms.legend
    ).reduced()


def pareto_chart(arms: Arms, rows: Rows) -> Chart | None:
    """Quality at the end against every cost that is known; None of fewer than two arms."""
    best = _best(arms)
    if len(best) < 2:
        return None
    nested = [_sizes_series(arm, setting, rows) for arm, setting in best if setting.sizes]
    series = [*_by_family(best, COSTS, rows), *nested]
    rated = (
        ", each with the learning rate that was best for it" if any(len(arm.settings) > 1 for arm, _ in best) else ""
    )
    caption = (
        f"{counted(len(best), 'arm')}{rated}: {seeds_of([setting for _, setting in best])}. The dashed line goes "
        "through those that no other one beats: as good for less."
    )
    if nested:
        caption += " Other lines join the sizes nested in one model."
    return Chart("pareto", "Quality against cost", caption, COSTS, arms.quality, series, arms.families,
                 front="no other is as good for less").reduced()  # fmt: skip


def recall_chart(arms: Arms, rows: Rows) -> Chart | None:
    """Accuracy against the size of the state that a sequence is remembered in; None of fewer than two arms."""
    accuracies = [measure for measure in VALIDATION if measure.more]
    best = _best(arms, accuracies[0])
    if len(best) < 2:
        return None
    state = Measure("cache_bytes", "state of one sequence (bytes)", log=True)
    size = Measure("parameters", "parameters", log=True)
    series = _by_family(best, (state, size), rows, line=True)
    unknown = [arm for arm, setting in best if not setting.values("cache_bytes")]
    caption = (
        f"Validation accuracy of {counted(len(best), 'arm')} at their best learning rate, against the bytes that one "
        f"sequence of the length of training is remembered in: {seeds_of([setting for _, setting in best])}. Lines "
        "join arms that differ in numbers alone."
    )
    if unknown:
        caption += f" The state of {counted(len(unknown), 'arm')} is not known."
    chart = Chart("recall", "Recall against state size", caption, (state, size), accuracies, series,
                  arms.families).reduced()  # fmt: skip
    return chart if chart.across else None


def _best(arms: Arms, decides: Measure | None = None) -> list[tuple[Arm, Setting]]:
    """Arms with a run that ended, each at the learning rate that suits it."""
    found = []
    for arm in arms.arms:
        setting = arms.best(arm) if decides is None else arm.best(decides)
        if setting is not None:
            found.append((arm, setting))
    return found


def _families(best: Sequence[tuple[Arm, Setting]]) -> list[str]:
    return list(dict.fromkeys(arm.family for arm, _ in best))


def _by_family(
    best: Sequence[tuple[Arm, Setting]], costs: Sequence[Measure], rows: Rows, line: bool = False
) -> list[Series]:
    """A series for each family, a point for each arm."""
    series = []
    for family in _families(best):
        members = [(arm, setting) for arm, setting in best if arm.family == family]
        if line:
            members.sort(key=lambda member: member[1].mean(costs[0].name) or 0)
        settings = [setting for _, setting in members]
        columns: dict[str, Column] = {cost.name: [setting.mean(cost.name) for setting in settings] for cost in costs}
        columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
        labels = [_label(arm, setting) for arm, setting in members]
        series.append(Series(family, family, columns | _quality(settings), line=line and len(members) > 1, marks=True,
                             labels=labels, rows=[rows.get(arm.label, "") for arm, _ in members]))  # fmt: skip
    return series


def _sizes_series(arm: Arm, setting: Setting, rows: Rows) -> Series:
    """The models nested in an arm's, a point for each."""
    settings = list(setting.sizes.values())
    columns = {name: [each.mean(name) for each in settings] for name in ("parameters", "flops_per_token")}
    labels = [f"{_label(arm, setting)}, size {name}" for name in setting.sizes]
    return Series(f"{arm.label}, its sizes", arm.family, columns | _quality(settings), marks=True, labels=labels,
                  rows=[rows.get(arm.label, "")] * len(labels))  # fmt: skip


def _label(arm: Arm, setting: Setting) -> str:
    several = len(arm.settings) > 1 and setting.rate is not None
    return arm.label + (f", learning rate {shown(setting.rate)}" if several else "")


def _quality(settings: Sequence[Setting]) -> dict[str, Column]:
    """Means and ranges over seeds of every measure of quality that any of them knows."""
    found: dict[str, Column] = {}
    for measure in QUALITY:
        values = [setting.values(measure.name) for setting in settings]
        if not any(values):
            continue
        found[measure.name] = [setting.mean(measure.name) for setting in settings]
        if any(len(each) > 1 for each in values):
            found[measure.name + LOW] = [min(each, default=None) for each in values]
            found[measure.name + HIGH] = [max(each, default=None) for each in values]
    return found


def _known(setting: Setting) -> bool:
    return any(setting.values(measure.name) for measure in QUALITY)
