"""A matrix for each head: its product and gradient are there in bfloat16 on a CPU, and those of rounded operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.models.layers.linear import by_head


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_matrix_for_each_head(dtype):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, 8, 2, 8)), dtype)
    w, dy = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((2, 8, 4), (2, 8, 2, 4)))

    @jax.jit
    def both(x, w):
        y, pull = jax.vjp(by_head, x, w)
        return y, *pull(dy)

    y, dx, dw = both(x, w)
    wide, rounded = np.asarray(x, np.float64), np.asarray(w.astype(dtype), np.float64)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, dtype, jnp.float32)
    np.testing.assert_allclose(y, np.einsum("bthd,hde->bthe", wide, rounded), rtol=1e-5, atol=1e-5)
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == jnp.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(np.asarray(dx, np.float64), np.einsum("bthe,hde->bthd", dy, rounded), **close)
    np.testing.assert_allclose(dw, np.einsum("bthd,bthe->hde", wide, dy), **close)
