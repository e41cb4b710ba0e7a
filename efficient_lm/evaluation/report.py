"""Results of an evaluation as text."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

FIGURES = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "documents", "windows")
WIDTH = 100


def text_report(scores: dict[str, Any]) -> str:
    """What `evaluate_documents` returned: the sentence, the figures, and the loss by context."""
    lines = textwrap.wrap(scores["scored"], WIDTH)
    lines += [f"  {name.replace('_', ' '):<14} {_figure(scores[name])}" for name in FIGURES]
    curve = [
        (f"{row['first']:,}" if row["first"] == row["last"] else f"{row['first']:,} to {row['last']:,}",
         f"{row['loss']:.4f}", f"{row['tokens']:,}")
        for row in scores["loss_by_context"]
    ]  # fmt: skip
    lines += _computed(scores)
    return "\n".join([*lines, "", *table(("tokens read", "loss", "tokens"), curve)])


def answers_report(scores: dict[str, Any]) -> str:
    """What `evaluate_answers` returned, a row per length."""
    data = scores["data"]
    options = ", ".join(f"{name} {value}" for name, value in data.items() if name not in ("kind", "length", "threads"))
    rows = [
        (f"{row['length']:,}", f"{row['accuracy']:.4f}", f"{row['sequence_accuracy']:.4f}", f"{row['loss']:.4f}",
         f"{row['answers']:,}", f"{row['rows']:,}")
        for row in scores["lengths"]
    ]  # fmt: skip
    head = ("length", "accuracy", "whole rows", "loss", "answers", "rows")
    more = [line for row in scores["lengths"] for line in _computed(row)]
    return "\n".join([*textwrap.wrap(f"{data['kind']}: {options}", WIDTH), *table(head, rows, left=0), *more])


def _computed(scores: dict[str, Any]) -> list[str]:
    """What was computed under a policy or depth rule, if that is not everything."""
    if "computed" not in scores:
        return []
    found = scores["computed"]
    return [
        f"  per token      {found['mixers_per_token']:.2f} mixers and {found['ffns_per_token']:.2f} ffns of "
        f"{len(found['mixer_shares'])} layers, {100 * found['flops_share']:.1f} % of the FLOPs of the whole model"
    ]


def diagnostics_report(layers: Sequence[dict[str, Any]]) -> str:
    """What `Model.diagnose` returned, a row per layer: states at the first and at the last place, means of the rest."""

    def ends(values: Sequence[float] | None) -> tuple[str, str]:
        return ("", "") if values is None else (f"{values[0]:.3g}", f"{values[-1]:.3g}")

    rows = []
    for number, layer in enumerate(layers):
        decay, entropy = layer.get("decay"), layer.get("attention_entropy")
        rows.append((
            str(number), layer["mixer"] or "none", *ends(layer.get("state_norm")), *ends(layer.get("state_maximum")),
            "" if decay is None else " ".join(f"{value:.3g}" for value in decay),
            "" if entropy is None else f"{sum(entropy) / len(entropy):.3f}",
        ))  # fmt: skip
    head = ("layer", "mixer", "state first", "last", "its largest", "last", "decay least, mean, most", "entropy, nats")
    return "\n".join(["", *table(head, rows, left=2)])


def decisions_report(layers: Sequence[dict[str, Any]]) -> str:
    """What `Model.depth_decisions` returned, a row per layer and their mean."""
    rows = [(str(row["layer"]), f"{row['depth_accuracy']:.4f}", f"{row['depth_share']:.4f}") for row in layers]
    means = [sum(row[name] for row in layers) / len(layers) for name in ("depth_accuracy", "depth_share")]
    head = ("layer", "decisions as top-k", "share that runs")
    lines = ["", *table(head, [*rows, ("mean", *(f"{mean:.4f}" for mean in means))]), ""]
    return "\n".join([*lines, "and by these decisions:"])


def attention_rank_report(layers: Sequence[dict[str, Any]]) -> str:
    """What `Model.attention_rank` returned, a row per layer."""
    rows = [
        (str(number), layer["mixer"] or "none", "" if layer["rank"] is None else f"{layer['rank']:.2f}",
         " ".join(f"{rank:.1f}" for rank in layer["ranks"] or ()))
        for number, layer in enumerate(layers)
    ]  # fmt: skip
    return "\n".join(["", *table(("layer", "mixer", "rank of attention", "by head"), rows, left=2)])


def task_report(tasks: dict[str, dict[str, Any]]) -> str:
    """What `run_tasks` returned, a row per metric."""
    rows = []
    for name, task in tasks.items():
        for metric, value in task["metrics"].items():
            error = value["stderr"]
            rows.append((
                name, metric, _figure(value["value"]), "" if error is None else f"± {error:.4f}",
                "" if task["examples"] is None else f"{task['examples']:,}",
                "" if task["fewshot"] is None else str(task["fewshot"]),
            ))  # fmt: skip
    return "\n".join(table(("task", "metric", "value", "", "examples", "shots"), rows, left=2))


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """The lines of a table whose first `left` columns are set to the left."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        cells = [
            f"{cell:<{width}}" if column < left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()


SCORES = {"text": text_report, "answers": answers_report}
"""For what `Model.evaluate` returned, by what was scored."""
