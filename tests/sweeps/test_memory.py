"""A run that does not fit is refused with the numbers."""

import pytest

from efficient_lm.config import load_run_config
from efficient_lm.errors import ResourceError
from efficient_lm.sweeps.memory import available_bytes, check_memory

SMALL = ["model.width=32", "model.repeats=3", "model.vocab_size=64", "model.tied=true", "ffn=mlp", "ffn.hidden=64",
         "mixer.heads=4", "mixer.kv_heads=2", "train.sequence_length=16", "train.batch_size=4"]  # fmt: skip


def test_what_a_step_needs_is_compared_with_what_there_is():
    config = load_run_config(SMALL)
    needed = check_memory(config, 10**9)
    assert needed["optimizer"] >= 2 * needed["parameters"] > 0 and needed["activations"] > 0
    total = sum(needed.values())
    assert check_memory(config, total) == needed
    with pytest.raises(ResourceError, match=r"wide: a step needs .* GB of each device, and there are .*: parameters"):
        check_memory(config, total - 1, "wide")
    assert ResourceError.status == 6


def test_this_machine_has_memory():
    assert available_bytes() > 1e6
