"""Costs of submodels are those of the models that are made of them."""

import jax
import pytest

from efficient_lm.elastic.budget import LAYERS, BudgetSpec, Meter, check_possible, fits
from efficient_lm.elastic.choices import choose
from efficient_lm.elastic.search.base import Space
from efficient_lm.elastic.submodels import submodel_spec
from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.models.parameters import count_parameters
from efficient_lm.validation import validate

SLIDING = {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "window": 4}, "ffn": {"kind": "mlp", "hidden": 64}}
RECURRENT = {"mixer": {"kind": "gla", "heads": 2}, "ffn": {"kind": "swiglu", "hidden": 32}}
ELASTIC = {"ffn": [0.25, 0.5, 1], "heads": [0.5, 1]}


def hybrid(elastic=ELASTIC):
    values = {"width": 16, "vocab_size": 32, "blocks": {"attend": SLIDING, "recur": RECURRENT}, "tied": False}
    values |= {"layout": ["attend", "recur"], "repeats": 2, "elastic": elastic}
    return validate(ModelSpec, values).build()


@pytest.mark.parametrize("levels", [(0, 0, 0, 0), (0, 1, 2, 1), (2, 2, 2, 2)])
def test_costs_are_those_of_the_model_that_is_made(levels):
    model = hybrid()
    meter = Meter(length=12)
    space = Space.of(model, meter)
    made = submodel_spec(model, choose(model, space.parts(levels))).build()
    caches = jax.eval_shape(lambda: made.init_caches(1, 12))
    expected = {
        "params": count_parameters(made.declarations),
        "flops_per_token": made.flops_per_token(12),
        "cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches)),
    }
    assert space.costs.of(levels) == pytest.approx(expected)
    assert meter.model(made) == pytest.approx(expected)
    assert space.costs.smallest == pytest.approx(space.costs.of((0, 0, 0, 0)))


def test_layers_of_one_size_are_measured_once(monkeypatch):
    measured = []
    monkeypatch.setattr("efficient_lm.elastic.budget._decoding_ms", lambda *program: measured.append(program) or 0.5)
    space = Space.of(hybrid({"ffn": [0.5, 1]}), Meter(length=8, latency=True))
    assert len(measured) == 2 * 2 + 1
    assert space.costs.of((0, 1, 0, 1))["latency_ms"] == 0.5 + 4 * 0.5 / LAYERS


def test_a_layer_is_measured():
    found = Meter(length=8, latency=True).layer(hybrid().layers[0], 16)
    assert 0 < found["latency_ms"] < 1e4


def test_what_fits():
    assert fits({"params": 10.0, "cache_bytes": 5.0}, {"params": 10.0})
    assert not fits({"params": 10.0, "cache_bytes": 5.0}, {"params": 10.0, "cache_bytes": 4.0})
    with pytest.raises(ConfigError, match="budget.params: 1,000, but no submodel has less than 12,345"):
        check_possible({"params": 1000.0}, {"params": 12345.0})
    with pytest.raises(ConfigError, match="budget: say what a submodel may have at most: params"):
        validate(BudgetSpec, {"length": 3})
    with pytest.raises(ConfigError, match="parms"):
        validate(BudgetSpec, {"parms": 3})
