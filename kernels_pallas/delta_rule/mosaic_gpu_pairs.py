"""Decayed products of the tokens of a chunk on Hopper GPUs, for a decay per head, and their gradient.

    reads_ij = q_i·k_j d_ij, i >= j      upper_ji = beta_i k_i·k_j d_ij, i > j      d_ij = 2^(s_i - s_j)

A block of threads takes a chunk of a head: two products [64,K] [K,64], weighed in registers. The backward kernel makes
both again; the gradient of s_i is the sum over all pairs that end in i less that over all that begin there.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.chunk_states.padding import over_group
from kernels_pallas.chunk_states.tiles import (
    CHUNK,
    COLUMNS,
    ROWS,
    WGMMA,
    along_columns,
    along_rows,
    floats,
    product,
    tile,
    vector,
)
from kernels_pallas.hopper import interpreted

_F32, _BF16 = jnp.float32, jnp.bfloat16
_SQUARE = (CHUNK, CHUNK)
_VECTORS = {
    "sums_rows": _F32,
    "sums_columns": _F32,
    "beta": _F32,
    "numbers_rows": jnp.int32,
    "numbers_columns": jnp.int32,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def decayed_pairs(sums, beta, q, k, numbers, simulated):
    """The decayed products of queries and of keys with earlier keys; differentiable in the first four arrays.

    Args:
        sums: float32 [B, H, N, 64], log2 of the decays of the chunk, up to the token. beta: float32 [B, H, N, 64].
        q, k: bfloat16 [B, T, G, K], T = 64 N and K a multiple of 64, at most 256.
        numbers: int32 [B, N, 64] or None; tokens of other numbers do not meet.

    Returns:
        reads bfloat16 and upper float32, as above, [B, N, H, 64, 64].
    """
    return _forward(sums, beta, q, k, numbers, simulated)[0]


def _forward(sums, beta, q, k, numbers, simulated):
    square = (sums.shape[0], sums.shape[2], sums.shape[1], *_SQUARE)
    outputs = {"reads": (square, _BF16), "upper": (square, _F32)}
    results = _call("delta_rule_pairs", _pairs, _arrays(sums, beta, q, k, numbers), outputs, simulated)
    return (results["reads"], results["upper"]), (sums, beta, q, k, numbers)


def _backward(simulated, residuals, cotangents):
    sums, beta, q, k, numbers = residuals
    arrays = _arrays(*residuals) | {"reads": cotangents[0], "upper": cotangents[1]}
    wide = (*q.shape[:2], sums.shape[1], q.shape[3])
    outputs = {name: (wide, _BF16) for name in ("q", "k")}
    outputs |= {name: (sums.shape, _F32) for name in ("sums_rows", "sums_columns", "beta")}
    results = _call("delta_rule_pairs_back", _gradients, arrays, outputs, simulated)
    dsums = math.log(2) * (results["sums_rows"] + results["sums_columns"])
    return dsums, results["beta"], over_group(results["q"], q), over_group(results["k"], k), None


decayed_pairs.defvjp(_forward, _backward)


def _arrays(sums, beta, q, k, numbers):
    """The arrays by name; what is needed both per row and per column of a product lies in two buffers."""
    arrays = {"q": q, "k": k, "sums_rows": sums, "sums_columns": sums, "beta": beta}
    return arrays if numbers is None else arrays | {"numbers_rows": numbers, "numbers_columns": numbers}


def _call(name, compute, arrays, outputs, simulated):
    """Run `compute`, which overwrites what is loaded, for every chunk of every head; returns the outputs by name."""
    batch, heads, chunks, _ = arrays["sums_rows"].shape
    keys = arrays["k"].shape[3]

    def part(name, array):
        row, chunk, head = (jax.lax.axis_index(axis) for axis in ("batch", "chunk", "head"))
        if name in ("q", "k"):
            return array.at[row, pl.ds(chunk * CHUNK, CHUNK), jax.lax.div(head, heads // array.shape[2])]
        if name in ("reads", "upper"):
            return array.at[row, chunk, head]
        return array.at[row, chunk] if name.startswith("numbers") else array.at[row, head, chunk]

    def body(*refs):
        *refs, held, loaded = refs
        for name, array in zip(arrays, refs, strict=False):
            plgpu.copy_gmem_to_smem(part(name, array), held[name], loaded)
        plgpu.barrier_wait(loaded)
        compute(held)
        plgpu.commit_smem()
        for name, array in zip(outputs, refs[len(arrays) :], strict=True):
            plgpu.copy_smem_to_gmem(held[name], part(name, array))
        plgpu.wait_smem_to_gmem(0)

    kinds = {"q": tile(CHUNK, keys), "k": tile(CHUNK, keys), "reads": tile(*_SQUARE), "keys": tile(*_SQUARE)}
    kinds |= {"upper": plgpu.SMEM(_SQUARE, _F32)} | {name: plgpu.SMEM((CHUNK,), of) for name, of in _VECTORS.items()}
    used = {**arrays, **outputs, "keys": None}
    results = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in outputs.values()],
        grid=(batch, chunks, heads),
        grid_names=("batch", "chunk", "head"),
        scratch_types=[{name: kinds[name] for name in used}, plgpu.Barrier(num_arrivals=len(arrays))],
        kernel_name=name,
        interpret=interpreted(simulated),
    )(*arrays.values())
    return dict(zip(outputs, results, strict=True))


def _indices():
    return [plgpu.broadcasted_iota(jnp.int32, _SQUARE, axis, layout=WGMMA) for axis in (0, 1)]


def _decays(held):
    """d_ij and d_ji [64,64], 0 where i < j, or j >= i of the second, and between documents."""
    rows, columns = _indices()
    exponents = along_rows(vector(held["sums_rows"], ROWS), _SQUARE)
    exponents = exponents - along_columns(vector(held["sums_columns"], COLUMNS), _SQUARE)
    lower, upper = rows >= columns, rows < columns
    if "numbers_rows" in held:
        numbers = along_rows(vector(held["numbers_rows"], ROWS), _SQUARE)
        same = numbers == along_columns(vector(held["numbers_columns"], COLUMNS), _SQUARE)
        lower, upper = lower & same, upper & same
    decays = (jnp.exp2(jnp.minimum(value, 0.0)) for value in (exponents, -exponents))
    return [jnp.where(seen, value, 0.0) for seen, value in zip((lower, upper), decays, strict=True)]


def _pairs(held):
    lower, upper = _decays(held)
    held["reads"][...] = (product((held["q"], held["k"].transpose((1, 0)))) * lower).astype(_BF16)
    beta = along_columns(vector(held["beta"], COLUMNS), _SQUARE)
    held["upper"][...] = product((held["k"], held["k"].transpose((1, 0)))) * upper * beta


def _gradients(held):
    lower, upper = _decays(held)
    rows, columns = _indices()
    beta = along_columns(vector(held["beta"], COLUMNS), _SQUARE)
    # Of q k: row i, column j. A token's product with itself does not decay.
    change = floats(held["reads"]) * lower
    held["reads"][...] = change.astype(_BF16)
    gain = jnp.where(rows > columns, change * product((held["q"], held["k"].transpose((1, 0)))), 0.0)
    # Of k k: row j, column i.
    change = floats(held["upper"]) * upper
    held["keys"][...] = (change * beta).astype(_BF16)
    change = change * product((held["k"], held["k"].transpose((1, 0))))
    held["sums_rows"][...] = jnp.sum(gain, axis=1) - jnp.sum(change * beta, axis=1)
    held["sums_columns"][...] = jnp.sum(change * beta, axis=0) - jnp.sum(gain, axis=0)
    held["beta"][...] = jnp.sum(change, axis=0)
    plgpu.commit_smem()
    reads, keys = held["reads"], held["keys"]
    turned = (reads.transpose((1, 0)), held["q"]), (keys, held["k"]), (keys.transpose((1, 0)), held["k"])
    dq, dk = product((reads, held["k"])), product(*turned)
    held["q"][...] = dq.astype(_BF16)
    held["k"][...] = dk.astype(_BF16)
