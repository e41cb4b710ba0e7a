"""Experts trained apart in one model."""

import jax
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.layered import layer_parameters, with_layers
from efficient_lm.upcycling.conversion import upcycled
from efficient_lm.upcycling.copying import CopySpec
from efficient_lm.upcycling.extraction import extracted, listed_experts
from efficient_lm.upcycling.merging import Source, merged
from efficient_lm.upcycling.statistics import domains_seen, labelled


@pytest.fixture(scope="module")
def public(made, dense_spec):
    return made(dense_spec({"kind": "mlp", "hidden": 8}, layers=2))


def changed(params, names, key):
    """Parameters, those whose path has one of the names moved; of experts and routers what is the second's alone."""

    def move(path, leaf):
        path = ".".join(step.key for step in path)
        if not any(name in path for name in names):
            return leaf
        noise = 0.3 * jax.random.normal(jax.random.key(key), leaf.shape)
        if "router" in path:
            return leaf.at[..., 1].add(noise[..., 1])
        return leaf.at[:, 1].add(noise[:, 1]) if "experts" in path else leaf + noise

    return jax.tree.map_with_path(move, params)


@pytest.fixture(scope="module")
def trained(public, rows):
    """Mixtures of the frozen public channel mixers and of trained ones, each a source."""
    spec, params = upcycled(public.model, public.params, CopySpec(experts=2, top_k=2), jax.random.key(0))
    names, model = ["ffn.inner.experts", "router"], spec.build()
    return [Source(f"runs/{number}", model, changed(params, names, number), rows(3, 0, 31)) for number in range(3)]


def logits(made, found):
    return made(*found).logits()


def test_the_public_expert_is_taken_once_and_experts_drop_at_will(made, trained):
    spec, params = merged(trained)
    assert [layer.ffn.experts for layer in spec.layers()] == [4, 4]
    model = spec.build()
    for number, values in enumerate(layer_parameters(model, params)):
        sources = [layer_parameters(source.model, source.params)[number]["ffn"]["inner"] for source in trained]
        want = [sources[0]["experts"]["up"]["weight"][0], *(s["experts"]["up"]["weight"][1] for s in sources)]
        np.testing.assert_array_equal(values["ffn"]["inner"]["experts"]["up"]["weight"], np.stack(want))
        rows = values["ffn"]["inner"]["router"]["weight"]
        np.testing.assert_array_equal(rows[:, 2], sources[1]["router"]["weight"][:, 1])
        np.testing.assert_allclose(rows[:, 0], sources[0]["router"]["weight"][:, 0], rtol=1e-6)
    # Without the others' experts it is the source again.
    for number, source in enumerate(trained):
        alone = extracted(model, params, listed_experts(model, [0, 1 + number]))
        want = made(source.model.spec, source.params).logits()
        np.testing.assert_allclose(logits(made, alone), want, atol=1e-5 * np.abs(want).max())


def test_dense_models_are_an_expert_each(made, public, rows):
    texts = [rows(3, 0, 31), rows(3, 0, 8)]
    params = changed(public.params, ["layer_0.ffn.inner"], 1)
    both = zip(("runs/public", "runs/law"), (public.params, params), texts, strict=True)
    sources = [Source(name, public.model, values, text) for name, values, text in both]
    spec, params = merged(sources, bias=-0.5)
    mixture = spec.layers()[0].ffn
    assert (mixture.experts, mixture.top_k, mixture.router.bias, mixture.router.normalize) == (2, 2, True, True)
    for number, values in enumerate(layer_parameters(spec.build(), params)):
        router = values["ffn"]["inner"]["router"]
        np.testing.assert_array_equal(router["bias"], [0, -0.5])
        for place, source in enumerate(sources):
            seen = domains_seen(source.model, source.params, labelled([source.rows]))[number]
            np.testing.assert_allclose(router["weight"][:, place], seen.inputs[0], rtol=1e-5)


def test_a_dense_public_model_beside_mixtures(public, trained, rows):
    sources = [Source("runs/public", public.model, public.params, rows(3, 0, 31)), *trained[:2]]
    spec, params = merged(sources, top_k=1)
    assert spec.layers()[0].ffn.experts == 3 and spec.layers()[0].ffn.top_k == 1
    row = layer_parameters(spec.build(), params)[0]["ffn"]["inner"]["router"]["weight"][:, 0]
    seen = domains_seen(public.model, public.params, labelled([sources[0].rows]))[0]
    np.testing.assert_allclose(row, seen.inputs[0], rtol=1e-5)


def test_layers_that_are_equal_stay_dense(public, rows):
    layers = layer_parameters(public.model, public.params)
    layers[1] = changed(layers[1], ["ffn.inner"], 4)
    other = with_layers(public.model, public.params, layers)
    sources = [Source(name, public.model, params, rows(2, 0, 31))
               for name, params in (("a", public.params), ("b", other))]  # fmt: skip
    spec, _ = merged(sources)
    assert [layer.ffn.kind for layer in spec.layers()] == ["mlp", "moe"]


def test_faults(made, public, dense_spec, trained, rows):
    def fails(words, sources, **options):
        with pytest.raises(ConfigError, match=words):
            merged(sources, **options)

    def dense(name, params, model=public.model):
        return Source(name, model, params, rows(2, 0, 31))

    first = dense("a", public.params)
    fails("they are equal", [first, dense("b", public.params)])
    moved = changed(public.params, ["mixer.inner.query"], 1)
    fails(
        "'layers.0.mixer.inner.query.weight' of b differs from that of a",
        [first, dense("b", changed(moved, ["ffn.inner"], 1))],
    )
    wider = made(dense_spec({"kind": "mlp", "hidden": 16}, layers=2))
    fails("b does not fit the others: layer 0: expert.expansion", [first, dense("b", wider.params, wider.model)])
    deeper = made(dense_spec({"kind": "mlp", "hidden": 8}, layers=3), params={})
    with pytest.raises(ConfigError, match="b is of another architecture than a: "):
        merged([first, Source("b", deeper.model, made(deeper.spec).params)])
    fails("top_k: 5, but there are 4 experts; at most 4", trained, top_k=5)
    fails("rows: a is dense and has no trained router", [first, trained[0]], rows="trained")
    both = merged(trained[:2])
    again = Source("ab", both[0].build(), both[1], rows(2, 0, 31))
    fails("rows: ab has 2 experts of its own", [again, trained[2]], rows="domains")
    assert merged([again, trained[2]])[0].layers()[0].ffn.experts == 4
