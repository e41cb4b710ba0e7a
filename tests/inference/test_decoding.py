"""Cached decoding against the full pass, for batches of prompts of unequal length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.models.language_model import ModelSpec

GREEDY = SamplingSpec(temperature=0.0)
PROMPTS = [np.array([5], np.int32), np.array([1, 2, 3, 4, 5, 6, 7], np.int32), np.array([9, 8, 7], np.int32)]


@pytest.fixture(scope="module", params=[{}, {"window": 4, "kept_tokens": 1}, {"position": {"kind": "alibi"}}])
def decoder(request, drawn):
    mixer = {"kind": "attention", "heads": 2, **request.param}
    block = {"mixer": mixer, "ffn": {"kind": "mlp"}}
    spec = {
        "width": 16,
        "vocab_size": 23,
        "blocks": {"layer": block},
        "layout": ["layer"],
        "repeats": 2,
        "init_std": 0.6,
    }
    model = ModelSpec.model_validate(spec).build()
    return Decoder(model, drawn(model))


def made(decoder, prompts, count, sampling=GREEDY, **options):
    return np.stack(list(decoder.stream(prompts, count, sampling, **options)), 1)


def test_greedy_tokens_equal_those_of_the_full_pass(decoder):
    ids = PROMPTS[1].tolist()
    full = jax.jit(decoder.model.logits)
    for _ in range(6):
        padded = jnp.asarray([ids + [0] * (16 - len(ids))])
        ids.append(int(jnp.argmax(full(decoder.params, padded)[0, len(ids) - 1])))
    assert made(decoder, [PROMPTS[1]], 6)[0].tolist() == ids[7:]


def test_a_row_of_a_batch_is_as_if_alone(decoder):
    batch = made(decoder, PROMPTS, 8)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        assert row.tolist() == made(decoder, [prompt], 8)[0].tolist()


def test_a_seed_repeats_and_another_differs(decoder):
    hot = SamplingSpec(temperature=2.0)
    first = made(decoder, PROMPTS, 12, hot, seed=1)
    assert np.array_equal(first, made(decoder, PROMPTS, 12, hot, seed=1))
    assert not np.array_equal(first, made(decoder, PROMPTS, 12, hot, seed=2))


def test_a_row_that_has_ended_repeats_the_end(decoder):
    free = made(decoder, PROMPTS, 10)
    end = int(free[0, 2])
    stopped = made(decoder, PROMPTS, 10, end=end)
    for before, after in zip(free, stopped, strict=False):
        stop = np.flatnonzero(before == end)
        cut = stop[0] if len(stop) else len(after)
        assert after[:cut].tolist() == before[: min(cut, len(after))].tolist() and np.all(after[cut:] == end)


def test_a_table_of_positions_bounds_prompt_and_continuation(drawn):
    block = {"mixer": {"kind": "attention", "heads": 2, "position": {"kind": "none"}}}
    spec = {"width": 16, "vocab_size": 23, "blocks": {"layer": block}, "layout": ["layer"], "learned_positions": 8}
    model = ModelSpec.model_validate(spec).build()
    decoder = Decoder(model, drawn(model))
    assert made(decoder, [PROMPTS[1]], 1).shape == (1, 1)
    with pytest.raises(ConfigError, match="prompt \\+ max_new_tokens: 9 tokens"):
        next(decoder.stream([PROMPTS[1]], 2, GREEDY))
