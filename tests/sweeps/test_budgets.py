"""Every arm has its budget: counted from the config that its run gets, not from what the search believed."""

import pytest

from efficient_lm.config import RunConfig
from efficient_lm.errors import ConfigError
from efficient_lm.models.parameters import count_parameters
from efficient_lm.sweeps import budgets
from efficient_lm.sweeps.budgets import BudgetSpec, fit, fit_all
from efficient_lm.sweeps.sizing import Sizable, hidden_sizes
from efficient_lm.training.accounting import run_flops_per_token
from efficient_lm.training.portions import Portions
from efficient_lm.validation import validate

MIXERS = [
    "attention", "based", "delta_net", "differential_attention", "gated_delta_net", "gla", "hedgehog", "hgrn2", "kda",
    "lightning", "linear_attention", "mamba", "mamba2", "mamba_mixer", "matmul_free", "multi_latent", "native_sparse",
    "parallel", "retention", "rg_lru", "short_conv",
]  # fmt: skip
SMALL = ["model.width=64", "model.repeats=2", "train.sequence_length=64", "train.batch_size=4", "train.steps=100"]


def budget(**given):
    return validate(BudgetSpec, given, "budget")


def fitted(composed, overrides, **given):
    """What is found, and the config of a run whose command line has it."""
    found = fit(composed(*overrides), budget(**given), "arm")
    values = composed(*overrides, *found.overrides)
    config = Sizable(values).config
    model = config.model.build()
    assert validate(RunConfig, values).train.steps == found.columns["steps"]
    assert count_parameters(model.declarations) == found.columns["parameters"]
    assert abs(found.columns["deviation"]) <= found_tolerance(given)
    return found, config, model


def found_tolerance(given):
    return given.get("tolerance", 0.02)


def training_flops(config, model):
    return run_flops_per_token(config, model) * Portions(config.train).tokens()


@pytest.mark.quick_for("attention-swiglu", "mamba2-moe", "rg_lru-swiglu", "multi_latent-moe")
@pytest.mark.parametrize("ffn", ["swiglu", "mlp", "moe"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_arm_has_as_many_parameters(composed, mixer, ffn):
    overrides = [*SMALL, f"mixer={mixer}", f"ffn={ffn}"]
    _, config, model = fitted(composed, overrides, params=400_000)
    assert count_parameters(model.declarations) == pytest.approx(400_000, rel=0.02)
    assert config.model.width % 8 == 0 and config.model.repeats == 2


def test_embeddings_are_counted_or_not(composed):
    found, _, model = fitted(composed, SMALL, params=400_000, embeddings=False)
    table = 257 * model.spec.width
    assert found.columns["embedding_parameters"] == 2 * table
    assert count_parameters(model.declarations) - 2 * table == pytest.approx(400_000, rel=0.02)


def test_flops_per_token_are_those_of_the_forward_pass(composed):
    _, _, model = fitted(composed, [*SMALL, "mixer=gla"], flops_per_token=1e6)
    assert model.flops_per_token(64) == pytest.approx(1e6, rel=0.02)


def test_flops_of_a_run_are_met_by_its_steps(composed):
    found, config, model = fitted(composed, [*SMALL, "mixer=mamba2"], flops=1e11)
    assert config.model.width == 64 and [text for text in found.overrides if "steps" not in text] == []
    assert training_flops(config, model) == pytest.approx(1e11, rel=0.02)


def test_size_and_length_go_together(composed):
    _, config, model = fitted(composed, SMALL, params=300_000, flops=5e11)
    assert count_parameters(model.declarations) == pytest.approx(300_000, rel=0.02)
    assert training_flops(config, model) == pytest.approx(5e11, rel=0.02)


def test_tokens_per_parameter(composed):
    found, config, model = fitted(composed, SMALL, tokens_per_parameter=10, flops=1e12)
    assert found.columns["tokens"] / count_parameters(model.declarations) == pytest.approx(10, rel=0.02)
    assert training_flops(config, model) == pytest.approx(1e12, rel=0.02)


def test_flops_may_resize_a_model_instead(composed):
    found, config, model = fitted(composed, SMALL, flops=1e11, resize="width")
    assert config.train.steps == 100 and found.columns["width"] != 64
    assert training_flops(config, model) == pytest.approx(1e11, rel=0.02)


def test_depth_and_hidden_sizes_alone(composed):
    deeper, config, _ = fitted(composed, SMALL, params=400_000, resize="depth")
    assert config.model.width == 64 and deeper.columns["layers"] > 2
    wider, config, _ = fitted(composed, SMALL, params=400_000, resize="ffn")
    assert (config.model.width, config.model.repeats) == (64, 2) and wider.columns["hidden"] > 4 * 64


def test_width_and_depth_in_proportion(composed):
    for params in (200_000, 2_000_000):
        found, _, _ = fitted(composed, SMALL, params=params, aspect=32)
        assert 20 < found.columns["width"] / found.columns["layers"] < 48
    assert found.columns["layers"] > 2


def test_heads_that_are_given_divide_the_width(composed):
    _, config, _ = fitted(composed, [*SMALL, "mixer.heads=5", "model.width=40"], params=400_000)
    assert config.model.width % 40 == 0


def test_hidden_sizes_that_are_given_grow_with_the_width(composed):
    narrow = [*SMALL, "ffn=mlp", "ffn.hidden=64"]
    found, config, _ = fitted(composed, narrow, params=400_000)
    assert config.model.width > 96 and 0.75 < found.columns["hidden"] / config.model.width < 1.4


def test_a_model_without_channel_mixers_takes_the_width_or_depth_that_fits(composed):
    alone = [*SMALL, "mixer=mamba", "model.blocks.layer.ffn=null"]
    found, config, _ = fitted(composed, alone, params=500_000)
    assert found.columns["hidden"] is None and config.model.width % 4 == 0


def test_a_part_that_the_config_leaves_to_its_default(composed):
    bare = [*SMALL, "~model.blocks.layer.ffn.expert"]
    found, _, _ = fitted(composed, [*bare, "ffn=moe"], params=400_000)
    assert any(text.startswith("model.blocks.layer.ffn.expert={kind: swiglu, hidden: ") for text in found.overrides)


@pytest.mark.quick_for("hybrid_moe_tiny")
@pytest.mark.parametrize("model", ["mamba2_hybrid_tiny", "hybrid_moe_tiny"])
def test_all_blocks_of_a_layout_change_alike(composed, model):
    values = composed(f"model={model}")
    before = dict(hidden_sizes(Sizable(values).config.model))
    found, config, _ = fitted(composed, [f"model={model}"], params=1_500_000)
    after = dict(hidden_sizes(config.model))
    assert before.keys() == after.keys() and found.columns["layers"] == len(config.model.layer_names())
    # The same factor for all, but for rounding.
    factors = [after[path][0] / before[path][0] for path in before]
    assert max(factors) < 1.3 * min(factors)


def test_models_inside_keep_whole_units(composed):
    """The budget of a nested run counts what is trained in its steps, and its parts stay whole numbers of units."""
    overrides = ["experiment=quickstart", "model.repeats=2", "train.batch_size=2"]
    found, config, model = fitted(composed, overrides, params=700_000, flops=1e12)
    assert all(size % 8 == 0 for _, sizes in hidden_sizes(config.model) for size in sizes)
    whole = 3 * model.flops_per_token(config.train.sequence_length) * found.columns["tokens"]
    assert found.columns["training_flops"] == pytest.approx(1e12, rel=0.02) and whole > 1.2e12


def test_sizes_that_change_during_a_run_are_counted(composed):
    grown = [*SMALL, "train.batch_schedule={start: 1, until: 0.5}", "train.sequence_schedule=[{until: 0.2, size: 16}]"]
    found, config, model = fitted(composed, grown, flops=1e11)
    assert found.columns["training_flops"] == pytest.approx(1e11, rel=0.02)
    assert found.columns["tokens"] < config.train.steps * 4 * 64


def test_seconds_are_those_that_steps_were_measured_to_take(composed, monkeypatch):
    monkeypatch.setattr(budgets, "measured_seconds", lambda config: {(4, 64): 0.03})
    found, config, _ = fitted(composed, SMALL, params=400_000, seconds=60)
    assert config.train.steps == 2000 and found.columns["seconds"] == pytest.approx(60)


@pytest.mark.slow
def test_a_step_is_measured(composed):
    found = fit(composed(*SMALL), budget(seconds=5.0, tolerance=0.2))
    assert 1e-4 < 5.0 / found.columns["steps"] < 5


def test_what_already_fits_is_left_alone(composed):
    size = count_parameters(Sizable(composed(*SMALL)).config.model.build().declarations)
    found = fit(composed(*SMALL), budget(params=size, tolerance=0.005))
    assert found.overrides == [] and found.columns["deviation"] == 0


FAULTS = [
    ({"params": 1000}, r"arm: budget.params: 1,000, but the closest it comes is .* times as much\), with model.width=8"
                       r".*4,112 are of embeddings and head: lower model.vocab_size, or set budget.embeddings=false"),
    ({"params": 20_000, "resize": "depth"}, "with model.width=64, model.repeats=1; .*model.vocab_size"),
    ({"flops_per_token": 100, "resize": "width"}, "budget.flops_per_token: 100, but .*lower model.repeats, or raise"),
    ({"flops": 1e6}, r"budget.flops: 1e\+06, but the closest.*with train.steps=1; lower train.batch_size \(now 4\)"),
    ({"params": 400_001, "resize": "depth", "tolerance": 1e-5}, "budget.resize=width or ffn, or raise budget.toler"),
    ({"params": 1e6, "flops_per_token": 1e6}, "budget.flops_per_token: decides the same as budget.params"),
    ({"flops": 1e6, "seconds": 1}, "budget.seconds: decides the same as budget.flops"),
    ({"tolerance": 0.1}, "budget: say what all arms have alike: params, flops_per_token"),
    ({"params": 1e6, "resize": "steps"}, "budget.resize: steps does not decide params; valid: auto, width, depth, ffn"),
    ({"seconds": 10, "resize": "width"}, "budget.resize: width does not decide seconds; valid: auto, steps"),
    ({"flops": 1e12, "embeddings": False}, "budget.embeddings: says which parameters count"),
    ({"flops": 1e12, "aspect": 32}, "budget.aspect: changes width and depth"),
    ({"tokens_per_parameter": 20}, "budget.tokens_per_parameter: of how many tokens"),
    ({"parameters": 1e6}, "budget.parameters: unknown key; did you mean 'params'"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), FAULTS, ids=[str(list(given)) for given, _ in FAULTS])
def test_what_cannot_be_met_is_said(composed, given, words):
    with pytest.raises(ConfigError, match=words):
        fit(composed(*SMALL), budget(**given), "arm")


def test_a_schedule_that_takes_more_steps_than_there_are(composed):
    with pytest.raises(ConfigError, match="arm: schedule.warmup: 90"):
        fit(composed(*SMALL, "schedule.warmup=90"), budget(flops=1e10), "arm")


def test_a_model_that_is_there_is_not_resized(composed, tmp_path):
    values = composed(*SMALL) | {"init_from": str(tmp_path)}
    with pytest.raises(ConfigError, match="arm: init_from: the model's size is that of"):
        fit(values, budget(params=1e6), "arm")
    assert fit(values, budget(flops=1e11)).columns["width"] == 64


def test_all_arms_that_fail_are_named(composed):
    arms = {f"{mixer}": composed(*SMALL, f"mixer={mixer}") for mixer in ("attention", "gla")}
    assert list(fit_all(arms, budget(params=400_000))) == list(arms)
    with pytest.raises(ConfigError, match=r"(?s)attention: budget.params.*\ngla: budget.params"):
        fit_all(arms, budget(params=1000, resize="ffn"))
