"""What tests of sweeps share."""

import pytest

from efficient_lm.composition import compose


@pytest.fixture(scope="session")
def composed():
    """``composed(*overrides)`` → the plain config of a training run, with a vocabulary of bytes."""

    def values(*overrides):
        return compose("train", ["tokenizer=bytes", *overrides]).values

    return values
