"""The figures of docs/mixers.md, counted again, and that no kind and no layout is missing there."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import efficient_lm.models.block  # noqa: F401  (registers every kind)
from efficient_lm.models.mixers.base import MixerSpec
from efficient_lm.models.parameters import Blueprint, Initialization, count_parameters

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "mixers.md").read_text()
WIDTH, LENGTHS = 1024, (2048, 16384)
KINDS = sorted(kind for kind, found in MixerSpec.kinds.items() if found.__module__.startswith("efficient_lm."))


def figures(kind):
    """Parameters, FLOPs and cache as the page shows them."""
    spec = MixerSpec.kinds[kind]().resolved(WIDTH)
    blueprint = Blueprint(lambda: spec.build(WIDTH, Initialization()))
    flops = [f"{spec.flops_per_token(WIDTH, length) / 1e6:.1f}" for length in LENGTHS]

    def cache(length):
        if spec.bidirectional:
            return "none"
        make = lambda: blueprint(blueprint.init(jax.random.key(0))).init_cache(1, length, jnp.bfloat16)  # noqa: E731
        leaves = jax.tree.leaves(jax.eval_shape(make))
        return f"{sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) / 1e3:,.0f}"

    return [f"{count_parameters(blueprint.declarations) / 1e6:.2f}", *flops, *map(cache, LENGTHS)]


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_code(kind):
    rows = re.findall(rf"^\| `{kind}` \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 1
    assert rows[0].split(" | ")[1:6] == figures(kind)


def test_every_layout_is_named():
    models = {path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")} - {"uniform"}
    assert models == {name for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
                      for name in re.findall(r"`(\w+)`", row)} - set(KINDS)  # fmt: skip
