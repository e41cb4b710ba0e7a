"""The sweeps of `configs/sweep`: every arm is one that can be trained, and budgets are met by what is built."""

import jax
import pytest

from efficient_lm.composition import ConfigRoots, builtin_configs
from efficient_lm.config import load_run_config
from efficient_lm.sweeps.arms import Space, arms_of
from efficient_lm.sweeps.checking import Checked, Question, check
from efficient_lm.sweeps.config import read_sweep

READY = sorted(path.stem for path in (builtin_configs() / "sweep").glob("*.yaml"))
ARMS = {"architectures_tiny": 20, "isoflop_tiny": 30, "learning_rates": 20, "matformer_vs_independent": 5,
        "moe_granularity": 5, "mod_capacity": 4, "recall": 24, "tiny": 4}  # fmt: skip


def arms(name):
    """Each arm of a sweep by its name, with what is asked of it."""
    config, axes = read_sweep([f"sweep={name}"], ())
    space = Space.of(config, axes, ConfigRoots.of(()))
    groups = arms_of(space.grid(), space.seeds)
    question = Question((), budget=config.budget, figures=(config.metric.name,))
    return {group[0].name: question.of(group[0]) for group in groups}


@pytest.mark.parametrize("name", READY)
@pytest.mark.quick_for("matformer_vs_independent", "moe_granularity", "mod_capacity", "recall", "tiny")
def test_every_arm_can_be_trained(name):
    found = {arm: check(question) for arm, question in arms(name).items()}
    assert len(found) == ARMS[name] and all(isinstance(each, Checked) for each in found.values())


@pytest.mark.slow
def test_arms_of_architectures_tiny_have_the_parameters_of_their_budget():
    mixers = set()
    for arm, question in arms("architectures_tiny").items():
        found = check(question)
        config = load_run_config([*question.overrides, *found.known.overrides, "model.vocab_size=259"])
        model = config.model.build()
        built = jax.eval_shape(lambda model=model: model.init(jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(built)) == pytest.approx(1e6, rel=0.02), arm
        mixers.add((config.model.layers()[0].mixer.kind, config.model.layers()[0].ffn.kind))
    assert len(mixers) == 20


def test_granularity_changes_neither_parameters_nor_flops():
    found = {arm: check(question).figures for arm, question in arms("moe_granularity").items()}
    dense, *sparse = found.values()
    for name in ("parameters", "flops_per_token"):
        sizes = [figures[name] for figures in sparse]
        # All but the router, which has a row for each expert.
        assert max(sizes) < 1.03 * min(sizes), found
        assert name != "flops_per_token" or min(sizes) == pytest.approx(dense[name], rel=0.03)
