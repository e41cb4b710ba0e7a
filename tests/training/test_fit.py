"""What a checkpoint holds beside parameters is another optimizer's, or nothing: said, and nothing is lost."""

import jax
import jax.numpy as jnp
import optax
import pytest

from efficient_lm.errors import CheckpointError
from efficient_lm.training.checkpoints import Checkpoints
from efficient_lm.training.retention import Retention

PARAMS = {"layer": {"weight": jnp.arange(6.0).reshape(2, 3)}}


def items(optimizer=None):
    state = {"optimizer": {"optimizer": optimizer.init(PARAMS), "step": jnp.int32(3)}} if optimizer else {}
    return {"parameters": PARAMS, **state}


def found(folder, optimizer):
    """What is restored where `optimizer` is wanted."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), items(optimizer))
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(wanted)
    finally:
        checkpoints.close()


@pytest.fixture
def saved(tmp_path):
    def save(optimizer):
        checkpoints = Checkpoints(tmp_path, Retention(1))
        checkpoints.save(3, items(optimizer), {"step": 3})
        checkpoints.close()
        return tmp_path

    return save


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (optax.lion(1e-3), "'optimizer.0.nu.layer.weight' is float32[2, 3] in the checkpoint and nothing in the"),
        (optax.sgd(1e-3), "'optimizer.0.count' is int32[] in the checkpoint and nothing"),
        (optax.chain(optax.adamw(1e-3), optax.ema(0.9)), "'optimizer.0.0.count' is nothing in the checkpoint"),
        (optax.masked(optax.adamw(1e-3), {"layer": {"weight": False}}), "another optimizer: 'optimizer."),
    ],
)
def test_the_state_of_another_optimizer_is_refused(saved, caplog, other, words):
    folder = saved(optax.adamw(1e-3))
    with pytest.raises(CheckpointError) as error:
        found(folder, other)
    assert words in str(error.value) and f"init_from={folder}/3 and another run.name" in str(error.value)
    assert "damaged" not in caplog.text and found(folder, optax.adamw(1e-3))[1]["step"] == 3


def test_parameters_alone_are_no_state(saved):
    folder = saved(None)
    with pytest.raises(CheckpointError, match=r"holds parameters alone.*init_from="):
        found(folder, optax.adamw(1e-3))


def test_moments_of_another_precision_are_rounded(saved):
    read, _ = found(saved(optax.adamw(1e-3)), optax.adamw(1e-3, mu_dtype=jnp.bfloat16))
    assert read["optimizer"]["optimizer"][0].mu["layer"]["weight"].dtype == jnp.bfloat16
