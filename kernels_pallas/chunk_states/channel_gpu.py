"""Decays per channel within chunks: scaled queries and keys, and their decayed products, by kernels for all chunks.

The weight exp(sum of log-decays over j < t <= i) of a pair is the product of two factors at most 1 that meet at an
anchor between j and i. For every pair there is one of six levels m = 1, 2, 4, ..., 32 at which i lies in the later and
j in the earlier half of a run of 2 m tokens; the anchor is the border of the halves. At a level every token has one
factor and one role, so a single tile Z serves both sides: queries of later tokens and keys of earlier ones, each times
its factor; Z Zᵀ holds the level's pairs. Nothing is divided by a decay (arXiv 2312.06635 has two levels).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.chunk_states import channel_steps
from kernels_pallas.chunk_states.padding import Chunked, over_group
from kernels_pallas.chunk_states.tiles import CHUNK, float_tile, quotient, tile
from kernels_pallas.hopper import interpreted

_SQUARE = (CHUNK, CHUNK)


class Products(NamedTuple):
    """Queries and keys with their decays."""

    q_in: jax.Array  # bfloat16 [B, T, H, K], with the decay from the chunk's start; 0 after another document's state
    k_out: jax.Array  # bfloat16 [B, T, H, K], with the decay to the chunk's end; 0 before another document's state
    reads: jax.Array  # [B, N, H, C, C], q_i k_j with the decay from j to i, 0 for j > i and between documents


def channel_products(
    q: jax.Array,
    k: jax.Array,
    log_decay: jax.Array,
    documents: Chunked | None,
    *,
    dtype=jnp.bfloat16,
    simulated: bool = False,
) -> Products:
    """Queries, keys and their products with their decays, of every chunk; differentiable in q, k and log_decay.

    Args:
        q, k: bfloat16 [B, T, G, K], T a multiple of 64, K of 64 and at most 256.
        log_decay: float32 [B, T, H, K], at most 0; head h reads group h // (H // G).
        dtype: of reads, float32 for what is not to be rounded once more; their gradient is rounded to bfloat16.
    """
    return _channel_products(dtype, simulated, q, k, log_decay, documents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _channel_products(dtype, simulated, q, k, log_decay, documents):
    return _forward(dtype, simulated, q, k, log_decay, documents)[0]


def _forward(dtype, simulated, q, k, log_decay, documents):
    batch, time, _, width = k.shape
    heads, block = log_decay.shape[2], 128 if width % 128 == 0 else 64
    scaled = jax.ShapeDtypeStruct((batch, time, heads, width), jnp.bfloat16)
    reads = jax.ShapeDtypeStruct((batch, time // CHUNK, heads, *_SQUARE), dtype)
    launch = _Launch(_inputs(q, k, log_decay, documents), {"q": scaled, "k": scaled, "reads": reads}, block, whole=True)
    own = {"ranges": tile(*_SQUARE), "factored": tile(CHUNK, block)}
    got = launch(functools.partial(channel_steps.forward, width // block), own, "channel_products", simulated)
    return Products(got["q"], got["k"], got["reads"]), (q, k, log_decay, documents)


def _backward(dtype, simulated, residuals, changes):
    q, k, log_decay, documents = residuals
    block, like = 64, jax.ShapeDtypeStruct(log_decay.shape, jnp.bfloat16)
    inputs = _inputs(q, k, log_decay, documents)
    changes = changes._replace(reads=changes.reads.astype(jnp.bfloat16))
    inputs |= {f"d{name}": change for name, change in changes._asdict().items()}
    outputs = {"q": like, "k": like, "log_decay": jax.ShapeDtypeStruct(log_decay.shape, jnp.float32)}
    launch = _Launch(inputs, outputs, block, whole=False)
    own = {"ranges": tile(*_SQUARE), "chosen": tile(*_SQUARE), "factored": tile(CHUNK, block)}
    own["log_decay"] = float_tile(1, CHUNK, block)
    got = launch(channel_steps.backward, own, "channel_products_back", simulated)
    return over_group(got["q"], q), over_group(got["k"], k), got["log_decay"], None


_channel_products.defvjp(_forward, _backward)


def _inputs(q, k, log_decay, documents):
    """The arrays of both kernels; log2 of the decays in two bfloat16 parts."""
    exponents = log_decay * jnp.log2(jnp.e).astype(jnp.float32)
    coarse = jax.lax.reduce_precision(exponents, 8, 7)  # a mere cast to bfloat16 and back XLA may leave out
    fine = (exponents - coarse).astype(jnp.bfloat16)
    inputs = {"q": q, "k": k, "coarse": coarse.astype(jnp.bfloat16), "fine": fine}
    if documents is not None:
        inputs |= {"entered": documents.entered().astype(jnp.float32), "left": documents.left().astype(jnp.float32)}
        inputs |= {"numbers_rows": documents.number, "numbers_columns": documents.number}
    return inputs


class _Launch:
    """A kernel on a chunk and head, over all of their channels or, unless `whole`, over a block of them.

    Buffers of channels are [blocks, 64, block], with one block if not `whole`. What an output is called, the buffer
    that it is copied from is called too.
    """

    def __init__(self, inputs, outputs, block, *, whole):
        self.inputs, self.outputs, self.block, self.whole = inputs, outputs, block, whole
        batch, time, self.heads, self.width = outputs["k"].shape
        self.blocks = self.width // block if whole else 1
        self.grid = {"batch": batch, "chunk": time // CHUNK, "head": self.heads}
        if not whole:
            self.grid["block"] = self.width // block

    def __call__(self, step, own, name, simulated):
        """`step(held)` with the inputs and `own` buffers in `held`, from where the outputs are copied."""
        held = {key: self.buffer(value) for key, value in (self.inputs | self.outputs).items()} | own

        def body(*refs):
            *refs, held, loaded = refs
            given = dict(zip(self.inputs, refs, strict=False))
            wanted = dict(zip(self.outputs, refs[len(given) :], strict=True))
            for key, ref in given.items():
                for part, place in self.parts(self.inputs[key], ref, held[key]):
                    plgpu.copy_gmem_to_smem(part, place, loaded)
            plgpu.barrier_wait(loaded)
            step(held)
            plgpu.commit_smem()
            for key, ref in wanted.items():
                for part, place in self.parts(self.outputs[key], ref, held[key]):
                    plgpu.copy_smem_to_gmem(place, part)
            plgpu.wait_smem_to_gmem(0)

        copies = sum(self.blocks if value.ndim == 4 else 1 for value in self.inputs.values())
        results = plgpu.kernel(
            body,
            out_type=list(self.outputs.values()),
            grid=tuple(self.grid.values()),
            grid_names=tuple(self.grid),
            scratch_types=[held, plgpu.Barrier(num_arrivals=copies)],
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=interpreted(simulated),
        )(*self.inputs.values())
        return dict(zip(self.outputs, results, strict=True))

    def buffer(self, value):
        """For a vector [64], pairs [64, 64] or channels [blocks, 64, block] of an array."""
        if value.ndim == 3:
            return plgpu.SMEM((CHUNK,), value.dtype)
        if value.ndim == 5:
            return tile(*_SQUARE) if value.dtype == jnp.bfloat16 else float_tile(*_SQUARE)
        return tile(self.blocks, CHUNK, self.block)

    def parts(self, value, ref, buffer):
        """What a block of the grid holds of an array, with its place in the buffer."""
        row, chunk, head = (jax.lax.axis_index(axis) for axis in ("batch", "chunk", "head"))
        if value.ndim == 3:
            return [(ref.at[row, chunk], buffer)]
        if value.ndim == 5:
            return [(ref.at[row, chunk, head], buffer)]
        group, tokens = quotient(head, self.heads // value.shape[2]), pl.ds(chunk * CHUNK, CHUNK)
        first = 0 if self.whole else jax.lax.axis_index("block")
        columns = [pl.ds((first + i) * self.block, self.block) for i in range(self.blocks)]
        return [(ref.at[row, tokens, group, part], buffer.at[i]) for i, part in enumerate(columns)]
