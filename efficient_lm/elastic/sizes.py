"""The models inside a trained one, side by side: how large each is, and how well it does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_lm.elastic.nested import nested_models
from efficient_lm.models.language_model import LanguageModel
from efficient_lm.models.parameters import count_parameters
from efficient_lm.training.reporting import empty_plot, save_plot

COLOR = "#4c72b0"


def sizes(model: LanguageModel, validation: Mapping[str, float], context_length: int) -> list[dict[str, Any]]:
    """A row for each of the models inside an elastic one, the whole last.

    Args:
        validation: what the run's last validation found, ``val_bits_per_byte_0.5`` and the like.

    Returns:
        Rows of `size`, `parts`, `parameters`, `flops_per_token` (forward) and `bits_per_byte`, None if it was not
        measured.
    """
    rows = []
    for each in nested_models(model):
        name = "val_bits_per_byte" + ("" if each.is_whole else f"_{each.name}")
        rows.append(
            {
                "size": each.name,
                "parts": each.parts,
                "parameters": count_parameters(each.model.declarations),
                "flops_per_token": each.model.flops_per_token(context_length),
                "bits_per_byte": validation.get(name),
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as lines of text."""
    lines = [f"{'size':<16}{'parameters':>14}{'bits per byte':>16}"]
    for row in rows:
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        lines.append(f"{row['size']:<16}{row['parameters']:>14,}{bits:>16}")
    return "\n".join(lines)


def plot_sizes(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Draw bits per byte over parameters as a PNG at `path`; nothing is left half written."""
    axes = empty_plot("parameters, millions", "validation bits per byte", title)
    millions, bits = [row["parameters"] / 1e6 for row in rows], [row["bits_per_byte"] for row in rows]
    axes.plot(millions, bits, color=COLOR, marker="o", linewidth=1.8)
    for row, x, y in zip(rows, millions, bits, strict=True):
        axes.annotate(f"{row['size']}: {y:.3f}", (x, y), xytext=(6, 6), textcoords="offset points")
    axes.margins(x=0.12, y=0.15)
    return save_plot(axes, path)
