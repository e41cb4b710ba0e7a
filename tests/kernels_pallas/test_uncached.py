"""Programs compiled ahead stay out of the cache of programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from kernels_pallas.ahead import uncached


@pytest.fixture
def cache(tmp_path):
    """A folder that keeps every program."""
    keys = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, key) for key in keys]
    for key, value in zip(keys, (str(tmp_path), True, 0.0), strict=True):
        jax.config.update(key, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for key, value in zip(keys, before, strict=True):
        jax.config.update(key, value)
    compilation_cache.reset_cache()


def test_a_program_is_neither_kept_nor_read_though_others_were_before(cache):
    def kept(factor):
        before = set(cache.iterdir())
        jax.jit(lambda x: jnp.sin(x) * factor).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()
        return bool(set(cache.iterdir()) - before)

    assert kept(2)
    with uncached():
        assert not kept(3)
    assert kept(4)
