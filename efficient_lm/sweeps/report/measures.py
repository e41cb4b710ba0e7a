"""What is known of runs by name: labels, units, and which way is better."""

from collections.abc import Iterable

from efficient_lm.pages.chart import Measure

PROGRESS = (
    Measure("tokens", "tokens"),
    Measure("flops", "training FLOPs", log=True),
    Measure("seconds", "seconds of wall time"),
)
"""What a curve goes along. FLOPs are tokens times the FLOPs of a token, and axes of compute are read as logarithms."""

TRAINING = (Measure("loss", "training loss (nats per token)"),)
VALIDATION = (
    Measure("val_loss", "validation loss (nats per token)"),
    Measure("val_bits_per_byte", "validation bits per byte"),
    Measure("val_accuracy", "validation accuracy", more=True),
    Measure("val_sequence_accuracy", "validation accuracy of whole rows", more=True),
)
QUALITY = (*VALIDATION, *TRAINING)
"""How good a run is, the first that is known decides."""

COSTS = (
    Measure("parameters", "parameters", log=True),
    Measure("training_flops_per_token", "training FLOPs per token", log=True),
    Measure("flops_per_token", "forward FLOPs per token", log=True),
    Measure("training_flops", "training FLOPs", log=True),
    Measure("latency_ms", "latency (ms per decoded token)", log=True),
    Measure("cache_bytes", "cache of one sequence (bytes)", log=True),
    Measure("seconds", "seconds of wall time", log=True),
    Measure("device_memory_peak_bytes", "peak device memory (bytes)", log=True),
)
OTHERS = (
    Measure("tokens", "tokens"),
    Measure("step", "steps"),
    Measure("tokens_per_second", "tokens per second", more=True),
)
SHORT = {
    "loss": "training loss",
    "val_loss": "validation loss",
    "val_bits_per_byte": "bits per byte",
    "val_accuracy": "accuracy",
    "val_sequence_accuracy": "whole rows",
    "training_flops_per_token": "FLOPs/token",
    "flops_per_token": "forward FLOPs/token",
    "latency_ms": "ms/token",
    "cache_bytes": "cache bytes",
    "device_memory_peak_bytes": "peak bytes",
    "seconds": "seconds",
    "tokens_per_second": "tokens/s",
}
"""Headings of tables, where labels of axes are too long."""
ALIASES = {"params": "parameters"}
"""Names that a budget has for what a run calls otherwise."""

BY_NAME = {measure.name: measure for measure in (*QUALITY, *COSTS, *OTHERS)}


def ranked(metrics: Iterable[str]) -> tuple[Measure, ...]:
    """The measures of quality, those that sweeps judge by first."""
    first = [BY_NAME[name] for name in metrics if BY_NAME.get(name) in QUALITY]
    return (*first, *(measure for measure in QUALITY if measure not in first))


def known(measures: Iterable[Measure], names: Iterable[str]) -> list[Measure]:
    """Those of the measures that are among the names."""
    names = set(names)
    return [measure for measure in measures if measure.name in names]


def heading(name: str) -> str:
    """The heading of a column with this measure."""
    return SHORT.get(name) or (BY_NAME[name].label if name in BY_NAME else name.replace("_", " "))
