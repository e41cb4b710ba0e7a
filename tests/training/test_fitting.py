"""The largest batch that fits, and what makes a step fit: found in few sizes, and each one compiled."""

import jax
import pytest

from efficient_lm.config import load_run_config
from efficient_lm.training import fitting
from efficient_lm.training.compiling import peak_bytes
from efficient_lm.training.fitting import largest, largest_batch, remedy, with_fitting_accumulate
from efficient_lm.training.machines import Machine

SMALL = ["model.width=16", "model.repeats=2", "model.vocab_size=64", "ffn.hidden=32", "mixer.heads=2",
         "train.sequence_length=64", "train.batch_size=16"]  # fmt: skip


@pytest.mark.parametrize(
    ("peak", "size"),
    [
        (lambda rows: 100 + 7 * rows, 128),
        (lambda rows: 100 + 7 * rows + (50 if rows > 40 else 0), 121),
        (lambda rows: 100 + rows * rows // 100, 300),
        (lambda rows: 999 + rows, 1),
        (lambda rows: 1001 + rows, 0),
    ],
)
@pytest.mark.parametrize("first", [1, 4, 500])
def test_the_largest_size_within_a_limit(peak, size, first):
    sizes, asked = {first: peak(first)}, []

    def counted(rows):
        asked.append(rows)
        return peak(rows)

    found = largest(sizes, 1000, counted, compiled=9)
    assert found == size and len(set(asked)) == len(asked) and min([*asked, 1]) >= 1


@pytest.fixture(scope="module")
def peaks():
    """``peaks(*keys)`` → bytes of the step of a small config, each compiled once."""
    known = {}

    def peak(*keys):
        if keys not in known:
            known[keys] = peak_bytes(load_run_config([*SMALL, *keys]), jax.devices()[:1])
        return known[keys]

    return peak


def with_memory(bytes_, count=1):
    return Machine(tuple(jax.devices()[:1] * count), None, bytes_)


def test_the_largest_batch_is_compiled(peaks):
    config, limit = load_run_config([*SMALL, "train.accumulate=2"]), peaks("train.batch_size=40", "train.accumulate=2")
    found = largest_batch(config, with_memory(limit + 1000), peaks("train.accumulate=2"))
    assert found == (20, 40, limit)


def test_micro_batches_are_what_makes_a_step_fit(peaks):
    """No more of them than needed."""
    limit = peaks("train.accumulate=4")
    found = remedy(load_run_config(SMALL), with_memory(limit))
    assert found == (("train.accumulate=4",), limit)


@pytest.mark.slow
def test_recomputing_is_tried_where_rows_cannot_be_fewer(peaks):
    few = ["train.batch_size=1", "train.sequence_length=256", "model.repeats=8", "model.remat=none"]
    limit = peaks(*few[:3], "model.remat=full")
    assert limit < peaks(*few)
    assert remedy(load_run_config([*SMALL, *few]), with_memory(limit)) == (("model.remat=full",), limit)


def test_what_nothing_makes_fit_is_not_compiled(monkeypatch):
    monkeypatch.setattr(fitting, "peak_of", lambda *_: pytest.fail("its state alone is too large"))
    assert remedy(load_run_config(SMALL), with_memory(10_000)) is None


def test_micro_batches_that_do_not_divide_over_devices_are_fewer():
    config = load_run_config([*SMALL, "train.accumulate=8"])
    assert with_fitting_accumulate(config, with_memory(None, 4)).train.accumulate == 4
    assert with_fitting_accumulate(config, with_memory(None, 2)) is config
    assert with_fitting_accumulate(config, with_memory(None, 3)) is config
