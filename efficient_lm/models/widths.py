"""A model with the constant factors that go with its width, where the same model at another width is the measure."""

import math
from collections.abc import Sequence

from efficient_lm.errors import ConfigError
from efficient_lm.models.block import BlockSpec
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.spec import Spec


def held_to(spec: ModelSpec, base: ModelSpec) -> ModelSpec:
    """The same with constant factors by which its values stay as large as those of `base`, itself at another width.

    These are factors of the logits, ``base.width / width`` (Yang et al. 2022, table 8), of the embedding where it would
    grow with the width, and those of mixers (see `MixerSpec.held_to`).

    Raises:
        ConfigError: a mixer that has no factor which would hold it.
    """
    changes = {"logit_multiplier": spec.logit_multiplier * (base.width / spec.width)}
    if spec.embedding_multiplier == "sqrt_width" and spec.width != base.width:
        changes["embedding_multiplier"] = math.sqrt(base.width)
    blocks = {name: _held_block(name, spec, base) for name in spec.blocks}
    return spec.model_copy(update={**changes, "blocks": blocks})


def _held_block(name: str, spec: ModelSpec, base: ModelSpec) -> BlockSpec:
    block, names = spec.blocks[name], spec.layer_names()
    if block.mixer is None:
        return block
    pairs = zip(spec.layers(), base.layers(), strict=True)
    layers = [(mine.mixer, its.mixer) for own, (mine, its) in zip(names, pairs, strict=True) if own == name]
    try:
        held = [mine.held_to(its, spec.width, base.width) for mine, its in layers]
    except ConfigError as error:
        raise ConfigError(f"model.blocks.{name}.mixer.{error}") from None
    return block.model_copy(update={"mixer": _joined(block.mixer, [mine for mine, _ in layers], held)})


def _joined[S: Spec](spec: S, before: Sequence[Spec], after: Sequence[Spec]) -> S:
    """One spec for several layers, of what each layer's own became: values that differ are listed."""
    changes = {}
    for name in type(spec).model_fields:
        olds, news = ([getattr(each, name) for each in specs] for specs in (before, after))
        if olds == news:
            continue
        if isinstance(news[0], Spec):
            changes[name] = _joined(getattr(spec, name), olds, news)
        else:
            changes[name] = news[0] if len(set(news)) == 1 else tuple(news)
    return spec.model_copy(update=changes) if changes else spec
