"""Figures of a model's routing: loads, drops, what tokens and domains have to do with experts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from efficient_lm.data.packing import Batch
from efficient_lm.evaluation.report import table
from efficient_lm.evaluation.routing import STRETCHES, Routing, super_experts


def figures(
    layers: Sequence[Routing | None],
    batch: Batch,
    stability: Sequence[dict[str, Any]] = (),
    domains: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """What `layers` did on `batch`, as plain values.

    Args:
        stability: from `efficient_lm.evaluation.routing.agreement`.
        domains: rows of each domain by name, int64; None or one has no comparison.

    Returns:
        `rows`, `tokens`; `layers`, for each with experts what `layer_figures` says, `stability` (a row per step), and
        with several domains `domain_load` (shares by name) and `domain_distance` (mean total variation between a
        domain's load and that of the others together); `super_experts`; and `mean`, over layers, of `table_accuracy`,
        `table_chance` and `load_entropy`.
    """
    found = []
    for number, layer in enumerate(layers):
        if layer is None:
            continue
        row = {"layer": number, **layer_figures(layer, batch["tokens"])}
        row["stability"] = [{"step": s["step"], "agreement": s["agreement"][number]} for s in stability]
        if domains is not None and len(domains) > 1:
            row |= _by_domain(layer, domains)
        found.append(row)
    names = ("table_accuracy", "table_chance", "load_entropy")
    return {
        "rows": int(np.any(batch["segment_ids"] > 0, axis=1).sum()),
        "tokens": int((batch["segment_ids"] > 0).sum()),
        "layers": found,
        "mean": {name: float(np.mean([row[name] for row in found])) if found else None for name in names},
        "super_experts": super_experts(layers),
    }


def layer_figures(layer: Routing, tokens: np.ndarray) -> dict[str, Any]:
    """Of one layer.

    Returns:
        `experts`, `top_k`; `load`, each expert's share of routes; `load_entropy` (nats) and `load_entropy_most` (of
        equal loads); `largest_load_over_mean`; `dropped_share`, and `dropped_by_position`, for stretches of the row;
        `table_accuracy`, how often a table from token ids to experts, of every other row, has the first choice of the
        rows between; `table_chance`, of always naming the expert that is commonest there, and `uniform_chance`;
        `peaks` (see `Routing`).
    """
    load = layer.load / max(layer.load.sum(), 1)
    accuracy, chance = token_table(tokens, layer.first)
    return {
        "experts": layer.experts,
        "top_k": layer.top_k,
        "load": load.tolist(),
        "load_entropy": float(-(load * np.log(np.maximum(load, 1e-300))).sum()),
        "load_entropy_most": float(np.log(layer.experts)),
        "largest_load_over_mean": float(load.max() * layer.experts),
        "dropped_share": _share(layer.dropped, layer.routes),
        "dropped_by_position": list(_drops(layer)),
        "table_accuracy": accuracy,
        "table_chance": chance,
        "uniform_chance": 1.0 / layer.experts,
        "peaks": layer.peaks.tolist(),
    }


def token_table(tokens: np.ndarray, first: np.ndarray) -> tuple[float, float]:
    """How far the token alone says which expert comes first (OpenMoE, Xue et al. 2024, section 4.1).

    A table of the commonest expert of each token id, of even rows, is asked for those of odd rows; an id it does not
    have gets the expert that is commonest in even rows.

    Args:
        tokens: int ``[rows, time]``.
        first: the expert of each, -1 for none.

    Returns:
        Part of the tokens of odd rows whose expert it names, and of those with the commonest expert; nan without any.
    """
    experts = int(first.max(initial=0)) + 1
    fitted, asked = (slice(start, None, 2) for start in (0, 1))
    known, wanted = first[fitted] >= 0, first[asked] >= 0
    if not wanted.any() or not known.any():
        return float("nan"), float("nan")
    counts = np.zeros((int(tokens.max()) + 1, experts), np.int64)
    np.add.at(counts, (tokens[fitted][known], first[fitted][known]), 1)
    commonest = counts.sum(axis=0).argmax()
    named = np.where(counts.sum(axis=1) > 0, counts.argmax(axis=1), commonest)
    truth = first[asked][wanted]
    return float(np.mean(named[tokens[asked][wanted]] == truth)), float(np.mean(truth == commonest))


def _share(dropped: np.ndarray, routes: np.ndarray) -> float:
    return float((dropped & (routes >= 0)).sum() / max((routes >= 0).sum(), 1))


def _drops(layer: Routing) -> list[dict[str, Any]]:
    time = layer.routes.shape[1]
    edges = np.linspace(0, time, min(STRETCHES, time) + 1).astype(int)
    for first, end in zip(edges, edges[1:], strict=False):
        part = slice(first, end)
        yield {
            "first": int(first),
            "last": int(end - 1),
            "share": _share(layer.dropped[:, part], layer.routes[:, part]),
        }


def _by_domain(layer: Routing, domains: dict[str, np.ndarray]) -> dict[str, Any]:
    loads = {name: layer.load_of(rows).astype(float) for name, rows in domains.items()}
    total = sum(loads.values())

    def shares(load: np.ndarray) -> np.ndarray:
        return load / max(load.sum(), 1.0)

    distances = [0.5 * np.abs(shares(load) - shares(total - load)).sum() for load in loads.values()]
    return {
        "domain_load": {name: shares(load).tolist() for name, load in loads.items()},
        "domain_distance": float(np.mean(distances)),
    }


def routing_text(found: dict[str, Any]) -> str:
    """The figures as text, a row per layer with experts."""
    if not found["layers"]:
        return "\n  no layer has experts"
    rows = [_row(layer) for layer in found["layers"]]
    used = [column for column in range(len(HEAD)) if any(row[column] for row in rows)]
    head, rows = [HEAD[column] for column in used], [[row[column] for column in used] for row in rows]
    lines = ["", f"  routing of {found['tokens']:,} tokens in {found['rows']} rows", *table(head, rows)]
    for place in found["super_experts"]:
        lines.append(
            f"  Super Expert: layer {place['layer']}, expert {place['expert']}, peak {place['peak']:.4g} "
            f"({place['peak_over_median']:.1f} × the median)"
        )
    return "\n".join(lines)


HEAD = (
    "layer", "experts", "entropy / most", "largest / mean", "dropped", "first eighth", "last", "token table", "chance",
    "same since", "by domain",
)  # fmt: skip


def _row(layer: dict[str, Any]) -> tuple[str, ...]:
    drops, earliest = layer["dropped_by_position"], layer["stability"][:1]
    dropped = layer["dropped_share"] > 0
    return (
        str(layer["layer"]),
        f"{layer['top_k']} of {layer['experts']}",
        f"{layer['load_entropy'] / max(layer['load_entropy_most'], 1e-9):.3f}",
        f"{layer['largest_load_over_mean']:.2f}",
        f"{layer['dropped_share']:.3f}" if dropped else "",
        f"{drops[0]['share']:.3f}" if dropped else "",
        f"{drops[-1]['share']:.3f}" if dropped else "",
        f"{layer['table_accuracy']:.3f}",
        f"{layer['table_chance']:.3f}",
        f"{earliest[0]['agreement']:.3f} ({earliest[0]['step']})" if earliest else "",
        f"{layer['domain_distance']:.3f}" if "domain_distance" in layer else "",
    )
