"""Attention of `kernels_pallas` against a plain einsum softmax: training shapes, long rows, windows, decoding.

Run: python benchmarks/attention.py [--rounds 20] [--output benchmarks/results/attention.json]

`training` is the forward pass and the gradient in q, k and v. `in a layer` adds what training with rematerialised
layers costs: the forward pass once more, under a scan over layers. A line is timed only after its output agreed
with that of the plain form.
"""

import functools

import jax
import jax.numpy as jnp
from timing import command_line, machine, race, report, save

from kernels_pallas.attention import attention, xla

LAYERS = 4


def plain(q, k, v, segments, window=None):
    """The textbook form: all logits at once, masked, softmax."""
    repeats = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    index = jnp.arange(q.shape[1])
    seen = index[:, None] >= index
    if window is not None:
        seen &= index[:, None] - index < window
    seen = seen & (segments[:, :, None] == segments[:, None, :])
    logits = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(jnp.where(seen[:, None], logits, -1e30)), v)


def blocked(q, k, v, segments, window=None, block=0):
    """This package's form, with its default block or another."""
    chosen = xla.default_block
    xla.default_block = (lambda *_: block) if block else chosen
    try:
        return attention(q, k, v, segment_ids=segments, window=window, implementation="xla")
    finally:
        xla.default_block = chosen


def training(form, q, k, v, segments):
    return jax.value_and_grad(lambda *qkv: jnp.sum(form(*qkv, segments) ** 2), argnums=(0, 1, 2))(q, k, v)


def in_a_layer(form, q, k, v, segments):
    def loss(q, k, v):
        def layer(x, _):
            return x + form(x, k, v, segments), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), q, None, LAYERS)[0] ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)


def inputs(batch, time, heads, groups, width):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (batch, time, h, width)) for key, h in zip(keys, (heads, groups, groups), strict=True)
    )
    segments = jnp.broadcast_to(1 + jnp.arange(time) * 3 // (2 * time), (batch, time))
    return q, k, v, segments


def compare(title, forms, use, arguments, rounds):
    first, *others = (jax.jit(functools.partial(use, form))(*arguments) for form in forms.values())
    for name, other in zip(list(forms)[1:], others, strict=True):
        for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            if jnp.sqrt(jnp.mean((one - two) ** 2) / jnp.mean(one**2)) > 1e-3:
                raise SystemExit(f"{title}: {name} is wrong")
    rows = race({name: functools.partial(use, form) for name, form in forms.items()}, arguments, rounds)
    report(title, rows)
    return rows


def decode(arguments, rounds):
    q, k, v, positions, key_positions = arguments

    def grouped(q, k, v, positions, key_positions):
        groups = q.reshape(q.shape[0], k.shape[2], -1, q.shape[3])
        logits = jnp.einsum("bgrk,bsgk->bgrs", groups, k) * q.shape[3] ** -0.5
        seen = key_positions <= positions
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -1e30))
        return jnp.einsum("bgrs,bsgv->bgrv", weights, v).reshape(q.shape)

    def ours(q, k, v, positions, key_positions):
        return attention(q, k, v, query_positions=positions, key_positions=key_positions, implementation="xla")

    rows = race({"plain": grouped, "xla": ours}, arguments, rounds)
    report(f"decoding, q {q.shape}, cache {k.shape}", rows)
    return rows


def main():
    options = command_line(__doc__.splitlines()[0])
    print(*(f"{name} {value}" for name, value in machine().items()), sep=", ")
    results = {}
    for shape in ((8, 256, 4, 4, 64), (8, 256, 8, 2, 64), (2, 1024, 4, 4, 64)):
        for use in (training, in_a_layer):
            forms = {"plain": plain, "xla": blocked}
            if use is training:
                forms |= {f"xla, block {block}": functools.partial(blocked, block=block) for block in (32, 64, 128)}
            title = f"{use.__name__.replace('_', ' ')}, float32, B T H G K = {shape}"
            results[title] = compare(title, forms, use, inputs(*shape), options.rounds)
    windows = {"plain": functools.partial(plain, window=256), "xla": functools.partial(blocked, window=256)}
    title = "training, window 256, B T H G K = (1, 2048, 4, 4, 64)"
    results[title] = compare(title, windows, training, inputs(1, 2048, 4, 4, 64), max(3, options.rounds // 4))
    for batch, slots, heads, groups in ((8, 512, 4, 4), (8, 1024, 8, 2)):
        q, k, v, _ = inputs(batch, slots, heads, groups, 64)
        positions = jnp.full((batch, 1), slots - 5), jnp.broadcast_to(jnp.arange(slots), (batch, slots))
        results[f"decoding, B S H G K = {(batch, slots, heads, groups, 64)}"] = decode(
            (q[:, :1], k, v, *positions), 4 * options.rounds
        )
    save(options.output, results)


if __name__ == "__main__":
    main()
