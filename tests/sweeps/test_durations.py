"""Steps that cost what they may, whatever their batches."""

import pytest

from efficient_lm.config import TrainSpec
from efficient_lm.errors import ConfigError
from efficient_lm.sweeps.durations import run_seconds, steps_for


@pytest.mark.parametrize(("target", "steps"), [(0.3, 1), (10, 4), (11.3, 5), (2.5e9, 10**9)])
def test_the_nearest_number_of_steps(target, steps):
    assert steps_for(lambda count: 2.5 * count, target)[0] == steps


def test_numbers_of_steps_that_do_not_work_are_passed_over():
    def total(steps):
        if steps < 30:
            raise ConfigError("a warm-up of 30 steps")
        return float(steps)

    assert steps_for(total, 4.0) == (32, 32.0) or steps_for(total, 4.0)[0] in range(30, 33)
    assert steps_for(total, 100.0) == (100, 100.0)


def test_without_any_the_last_fault_is_said():
    def total(steps):
        raise ConfigError("never")

    with pytest.raises(ConfigError, match="never"):
        steps_for(total, 4.0)


def test_seconds_of_steps_of_several_shapes():
    train = TrainSpec(steps=10, batch_size=8, sequence_length=16, batch_schedule=[{"until": 4, "size": 2}])
    assert run_seconds(train, {(2, 16): 1.0, (8, 16): 3.0}) == 4 * 1.0 + 6 * 3.0
