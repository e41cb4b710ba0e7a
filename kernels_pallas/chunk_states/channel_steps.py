"""What the kernels of `channel_gpu` do to the tiles of a chunk and head.

Exponents are sums of log-decays over ranges of tokens: products with tiles of zeros and ones. Their gradients are
products with the same tiles, transposed. There are no differences of sums, here or there.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.chunk_states.tiles import (
    CHUNK,
    COLUMNS,
    ROWS,
    WGMMA,
    along_columns,
    along_rows,
    floats,
    loop,
    product,
    vector,
)

_SQUARE = (CHUNK, CHUNK)
_LEVELS = 6  # halves of 1, 2, 4, 8, 16 and 32 tokens


def forward(blocks: int, held) -> None:
    """Scale q and k in place, and fill reads [64, 64].

    `held`: q, k, coarse and fine [blocks, 64, block], the latter two of log2 of the decays.
    """
    products = product(*((held["q"].at[i], held["k"].at[i].transpose((1, 0))) for i in range(blocks)))
    reads = jnp.where(_index(0) == _index(1), products, 0.0)
    for i in range(blocks):

        def add(step, reads, i=i):
            level = jax.lax.shift_left(np.int32(1), step)
            _place(held["factored"], _roles(held, i, level) * _factors(held, i, _toward_border(level)))
            plgpu.commit_smem()
            pairs = product((held["factored"], held["factored"].transpose((1, 0))))
            return reads + jnp.where(_meet(level), pairs, 0.0)

        reads = loop(_LEVELS, add, reads)
        entering = _masked(held, "entered", _factors(held, i, _index(1) <= _index(0)))
        _place(held["q"].at[i], floats(held["q"].at[i]) * entering)
        leaving = _masked(held, "left", _factors(held, i, _index(1) > _index(0)))
        _place(held["k"].at[i], floats(held["k"].at[i]) * leaving)
    _place(held["reads"], jnp.where(_seen(held), reads, 0.0))


def backward(held) -> None:
    """Put the gradients of q and k in their places, and those of the log-decays into log_decay.

    `held`: q, k, coarse and fine as in `forward`, of one block, and the gradients dq_in, dk_out and dreads.
    """
    change = jnp.where(_seen(held), floats(held["dreads"]), 0.0)
    _place(held["dreads"], change)
    own = along_rows(jnp.sum(jnp.where(_index(0) == _index(1), change, 0.0), axis=1), _SQUARE)
    dq, dk = own * floats(held["k"].at[0]), own * floats(held["q"].at[0])

    def add(step, gradients):
        dq, dk = gradients
        level = jax.lax.shift_left(np.int32(1), step)
        factors = _factors(held, 0, _toward_border(level))
        change = _level_change(held, level, factors)
        _place(held["factored"], change * floats(held["factored"]))
        change *= factors
        later = _later(level)
        gradients = dq + jnp.where(later, change, 0.0), dk + jnp.where(later, 0.0, change)
        _to_steps(held)
        return gradients

    held["log_decay"][0] = plgpu.layout_cast(jnp.zeros(_SQUARE, jnp.float32), WGMMA)
    dq, dk = loop(_LEVELS, add, (dq, dk))
    entering = _masked(held, "entered", _factors(held, 0, _index(1) <= _index(0)))
    change = floats(held["dq_in"].at[0]) * entering
    _place(held["factored"], change * floats(held["q"].at[0]))
    _place(held["q"].at[0], dq + change)
    _to_steps(held)
    leaving = _masked(held, "left", _factors(held, 0, _index(1) > _index(0)))
    change = floats(held["dk_out"].at[0]) * leaving
    _place(held["factored"], change * floats(held["k"].at[0]))
    _place(held["k"].at[0], dk + change)
    _to_steps(held)


def _level_change(held, level, factors):
    """The gradient [64, 64] of the factored queries and keys of a level, which stay in their buffer."""
    _place(held["factored"], _roles(held, 0, level) * factors)
    _place(held["chosen"], jnp.where(_meet(level), floats(held["dreads"]), 0.0))
    plgpu.commit_smem()
    return product((held["chosen"], held["factored"]), (held["chosen"].transpose((1, 0)), held["factored"]))


def _place(ref, values):
    ref[...] = values.astype(ref.dtype)


def _factors(held, block, ranges):
    """2 to the sums of the exponents over `ranges` [64, 64] of tokens; the ranges stay in their buffer."""
    _place(held["ranges"], jnp.where(ranges, np.float32(1), np.float32(0)))
    plgpu.commit_smem()
    sums = product(*((held["ranges"], held[part].at[block]) for part in ("coarse", "fine")))
    return jnp.exp2(jnp.minimum(sums, 0.0))


def _to_steps(held):
    """Add the gradients of the log-decays, from those of their sums over the last ranges, which are in `factored`.

    The total lies in shared memory: registers are what this kernel has least of.
    """
    plgpu.commit_smem()
    change = product((held["ranges"].transpose((1, 0)), held["factored"]))
    total = held["log_decay"].at[0]
    total[...] = plgpu.load(total, layout=WGMMA, optimized=False) + change


def _masked(held, name, factors):
    """0 in the rows where the mask of that name is, if there is one."""
    return factors * along_rows(vector(held[name], ROWS), factors.shape) if name in held else factors


def _roles(held, block, level):
    """Queries of the later tokens and keys of the earlier ones."""
    queries, keys = floats(held["q"].at[block]), floats(held["k"].at[block])
    return jnp.where(_later(level, keys.shape), queries, keys)


def _index(axis, shape=_SQUARE):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)


def _later(level, shape=_SQUARE):
    """The row's token lies in the later half of its run of 2 * level tokens."""
    return (_index(0, shape) & level) != 0


def _toward_border(level):
    """Tokens whose decays lie between the row's token and the border of the halves of its run."""
    row, column = _index(0), _index(1)
    border = (row & -(2 * level)) + level
    return jnp.where(_later(level), (column >= border) & (column <= row), (column > row) & (column < border))


def _meet(level):
    """The row's token lies in the later and the column's in the earlier half of one run."""
    row, column = _index(0), _index(1)
    return ((row & -(2 * level)) == (column & -(2 * level))) & _later(level) & ((column & level) == 0)


def _seen(held):
    """The column's token is not after the row's, and of the same document."""
    seen = _index(1) <= _index(0)
    if "numbers_rows" in held:
        numbers = along_rows(vector(held["numbers_rows"], ROWS), _SQUARE)
        seen &= numbers == along_columns(vector(held["numbers_columns"], COLUMNS), _SQUARE)
    return seen
