"""Steps that stand out: what is one, what is remembered of those before, and what is refused in a config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import TrainSpec
from efficient_lm.errors import ConfigError
from efficient_lm.training.spikes import SpikeSpec, noted
from efficient_lm.validation import validate

SPEC = SpikeSpec(action="warn", window=16, threshold=8.0)


@pytest.fixture(scope="module")
def look():
    return jax.jit(lambda seen, loss, norm: SPEC.look(seen, loss, norm, jnp.isfinite(loss) & jnp.isfinite(norm)))


def series(count, seed=0):
    random = np.random.default_rng(seed)
    return [(3 * np.exp(0.1 * a), np.exp(0.3 * b)) for a, b in random.standard_normal((count, 2))]


def after(look, steps, seen=None):
    seen = SPEC.resumed({})["spikes"] if seen is None else seen
    scores = []
    for loss, norm in steps:
        score, seen = look(seen, jnp.float32(loss), jnp.float32(norm))
        scores.append(float(score))
    return scores, seen


def test_ordinary_steps_do_not_stand_out_and_a_tenfold_gradient_does(look):
    scores, seen = after(look, series(200))
    assert scores[:16] == [0.0] * 16 and max(scores) < 8
    assert after(look, [(3.0, 10.0)], seen)[0][0] > 5
    assert after(look, [(9.0, 1.0)], seen)[0][0] > 8
    by_hand = np.array(noted(seen))
    spread = 1.4826 * np.median(np.abs(by_hand[0] - np.median(by_hand[0])))
    expected = (np.log(9.0) - np.median(by_hand[0])) / max(spread, 0.05)
    assert after(look, [(9.0, 0.01)], seen)[0][0] == pytest.approx(expected, rel=1e-5)


def test_equal_values_have_room_for_a_few_percent_and_what_is_no_number_is_not_seen(look):
    _, seen = after(look, [(2.0, 1.0)] * 16)
    scores, then = after(look, [(2.2, 1.0), (np.nan, 1.0), (2.0, np.inf)], seen)
    assert 0 < scores[0] < 8 and scores[1:] == [0.0, 0.0]
    assert int(then["count"]) == 17
    assert after(look, [(4.0, 1.0)], seen)[0][0] > 8


def test_a_level_that_lasts_becomes_the_usual_one(look):
    scores, _ = after(look, [(2.0, 1.0)] * 16 + [(6.0, 1.0)] * 12)
    assert scores[16] > 8 and scores[-1] < 1


def test_what_was_seen_comes_back_to_the_bit(look):
    steps = series(60)
    whole, _ = after(look, steps)
    for cut in (5, 16, 37):
        first, seen = after(look, steps[:cut])
        again = SPEC.resumed({"spikes": noted(seen)})["spikes"]
        assert first + after(look, steps[cut:], again)[0] == whole
    assert SpikeSpec().resumed({"spikes": [[1.0], [1.0]]}) == {}
    shorter = SpikeSpec(action="warn", window=8).resumed({"spikes": noted(after(look, steps)[1])})["spikes"]
    np.testing.assert_allclose(shorter["logarithms"], np.log(np.array(steps[-8:])).T, rtol=1e-5)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"spike": {"action": "rollback"}}, r"train.spike.action: rollback needs train.rollback.at_most, which is 0"),
        ({"rollback": {"after": 30, "at_most": 1}}, r"train.rollback.after: 30 .*train.max_nonfinite=20"),
        ({"spike": {"action": "skp"}}, r"train.spike.action: .*skip"),
        ({"spike": {"window": 2}}, r"train.spike.window: .*at least 8"),
    ],
)
def test_what_does_not_fit_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        validate(TrainSpec, {"steps": 9, **values}, "train")
