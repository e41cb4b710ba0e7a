"""Matmul of rows in groups: tiles of several sizes, `jax.lax.ragged_dot`, and the plain matmul of as many rows.

Run: python benchmarks/grouped_matmul.py [--rounds 20] [--rows 4096] [--inputs 256] [--outputs 1024]
     [--groups 8 64] [--tiles 0 64 128 256] [--dtype float32] [--output benchmarks/results/grouped_matmul.json]

A line is the product with the gradients of rows and matrices, and the temporary memory of that compiled program; it is
timed only after its results agreed with the definition. Group sizes are uneven, as a router's are. Ratios refer to
`dense`, all rows times one matrix: the least that the same number of operations takes, with one matrix to read.
"""

import functools

import jax
import jax.numpy as jnp
from timing import command_line, machine, race, report, save

from efficient_lm.models.layers.linear import matmul
from kernels_pallas.grouped_matmul import grouped_matmul

BOUND = {"float32": 1e-4, "bfloat16": 3e-2}


def inputs(rows, width, outputs, groups, dtype):
    """Rows, matrices (float32), a cotangent, and sizes of groups that differ by a factor of ten or so."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, pull = (jax.random.normal(key, (rows, n), dtype) for key, n in zip(keys[:2], (width, outputs), strict=True))
    w = jax.random.normal(keys[2], (groups, width, outputs)) * width**-0.5
    shares = jax.random.dirichlet(keys[3], jnp.full(groups, 4.0))
    sizes = jnp.floor(shares * rows).astype(jnp.int32)
    return x, w, pull, sizes.at[0].add(rows - jnp.sum(sizes))


def training(form, x, w, pull, sizes):
    """The product, and the gradients of rows and matrices."""
    y, back = jax.vjp(lambda x, w: form(x, w, sizes), x, w)
    return y, *back(pull)


def dense(x, w, sizes):
    """All rows times the first matrix; the transpose of the rows is made first, which CPUs are faster with."""
    return matmul(x, w[0].astype(x.dtype))


def ragged(x, w, sizes):
    """What jax has."""
    return jax.lax.ragged_dot(x, w.astype(x.dtype), sizes)


def check(name, found, wanted, bound):
    """Stop unless results agree with the definition."""
    for got, value in zip(found, wanted, strict=True):
        if not jnp.abs(got.astype(jnp.float32) - value).max() < bound * jnp.abs(value).max():
            raise SystemExit(f"{name} is wrong")


def main():
    options = command_line(
        __doc__.splitlines()[0],
        rows={"type": int, "default": 4096, "help": "rows"},
        inputs={"type": int, "default": 256, "help": "columns of the rows"},
        outputs={"type": int, "default": 1024, "help": "columns of the results"},
        groups={"type": int, "nargs": "+", "default": [8, 64], "help": "numbers of groups"},
        tiles={
            "type": int,
            "nargs": "+",
            "default": [0, 32, 64, 128, 256],
            "help": "rows of a tile; 0: its own choice",
        },
        dtype={"choices": tuple(BOUND), "default": "float32", "help": "of rows and products"},
        ragged={"type": int, "default": 8, "help": "most groups that ragged_dot is timed with"},
    )
    print(*(f"{name} {value}" for name, value in machine().items()), sep=", ")
    results = {}
    for groups in options.groups:
        arguments = inputs(options.rows, options.inputs, options.outputs, groups, options.dtype)
        forms = {f"tiles of {tile}": functools.partial(grouped_matmul, tile=tile) for tile in options.tiles if tile}
        forms = ({"tiles": grouped_matmul} if 0 in options.tiles else {}) | forms
        if groups <= options.ragged:
            forms["ragged_dot"] = ragged
        used = {name: functools.partial(training, form) for name, form in forms.items()}
        exact = [value.astype(jnp.float32) for value in arguments[:3]]
        definition = functools.partial(training, functools.partial(grouped_matmul, implementation="reference"))
        wanted = jax.jit(definition)(*exact, arguments[3])
        for name, function in used.items():
            check(name, jax.jit(function)(*arguments), wanted, BOUND[options.dtype])
        title = f"[{options.rows}, {options.inputs}] x [{groups}, {options.inputs}, {options.outputs}]"
        rows = race({"dense": functools.partial(training, dense)} | used, arguments, options.rounds)
        report(title, rows)
        results[title] = rows
    save(options.output, results)


if __name__ == "__main__":
    main()
