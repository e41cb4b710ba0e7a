"""What verbs that make a model of another do at their end."""

from pathlib import Path

from efficient_lm.api import Model
from efficient_lm.models.ffns.moe import MoESpec
from efficient_lm.models.parameters import count_parameters


def save(model: Model, output: str, source: str, whole: Model | None = None) -> str:
    """Write a run directory of its own name; what was written, and what it can be used for, as text.

    Args:
        whole: the model that it is a part of, to compare sizes.

    Raises:
        CheckpointError: something is there.
    """
    run = model.config.run.model_copy(update={"name": Path(output).name, "dir": output})
    model.config = model.config.model_copy(update={"run": run})
    path = model.save(output)
    layers = model.model.layers
    experts = [layer.ffn.experts for layer in layers if isinstance(layer.ffn, MoESpec)]
    chosen = [number for number, layer in enumerate(layers) if layer.depth is not None and layer.depth.chooses]
    before = "" if whole is None else f" of {_millions(whole)}"
    lines, looks = [f"{source}: {_millions(model)}{before} M parameters → {path}"], []
    if experts:
        span = f"{min(experts)}" if len(set(experts)) == 1 else f"{min(experts)} to {max(experts)}"
        lines.append(f"{len(experts)} of {len(layers)} layers have experts, {span} each")
        looks.append("routing=true")
    if chosen:
        lines.append(f"{len(chosen)} of {len(layers)} layers choose their tokens: {', '.join(map(str, chosen))}")
        looks.append("selection=both")
    looked = " ".join(["efficient-lm evaluate", f"checkpoint={path}", *looks])
    return "\n".join([*lines, "next:", f"  {looked}", f"  efficient-lm train init_from={path}"])


def _millions(model: Model) -> str:
    return f"{count_parameters(model.model.declarations) / 1e6:,.1f}"
