"""Recurrent operators of `kernels_pallas` against length: chunks, the token scan, and `associative_scan`.

Run: python benchmarks/recurrent.py [--rounds 5] [--lengths 512 1024 ...] [--operators delta_rule ...]
     [--forms chunks ...] [--output benchmarks/results/recurrent.json]

A line is one forward pass with the gradients of all inputs, and the temporary memory of that compiled program. It is
timed only after its loss agreed with that of the first form. `associative_scan` applies to the operators whose state
is as wide as what goes into it. Ratios refer to the chunks of the same length.
"""

import functools
import math

import jax
import jax.numpy as jnp
from timing import command_line, machine, race, report, save

from kernels_pallas.delta_rule import delta_rule
from kernels_pallas.linear_attention import linear_attention
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.short_convolution import short_convolution

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def combine(earlier, later):
    """The composition of h -> a h + b with the same, later."""
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]


def associative_selective_scan(u, dt, A, B, C):
    """All states at once, [B, T, D, N]."""
    decays, inputs = jnp.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]
    states = jax.lax.associative_scan(combine, (decays, inputs), axis=1)[1]
    return jnp.einsum("btdn,btn->btd", states, C), states[:, -1]


def associative_linear_recurrence(log_a, x):
    """All states at once, [B, T, D]."""
    states = jax.lax.associative_scan(combine, (jnp.exp(log_a), x), axis=1)[1]
    return states, states[:, -1]


def inputs(shapes, negative=(), positive=(), unit=()):
    """Normal values; at the given positions negative, positive and small, or of length 1."""
    values = []
    for position, shape in enumerate(shapes):
        value = jax.random.normal(jax.random.key(position), shape)
        value = -jnp.abs(value) if position in negative else value
        value = 0.1 * jax.nn.softplus(value) if position in positive else value
        values.append(value / jnp.linalg.norm(value, axis=-1, keepdims=True) if position in unit else value)
    return tuple(values)


def operators(time, batch=1):
    """Name -> (operator, arguments, an associative form or None), at widths of a model of width 256."""
    channels, states = (batch, time, 512), (batch, time, 16)
    keys, values, heads = (batch, time, 4, 64), (batch, time, 4, 128), (batch, time, 4)
    shared, many = (batch, time, 1, 64), (batch, time, 8, 64)
    scan = inputs([channels, channels, (512, 16), states, states], negative=[2], positive=[1])
    delta = inputs([keys, keys, values, heads, heads], negative=[4], positive=[3], unit=[1])
    return {
        "selective_scan": (selective_scan, scan, associative_selective_scan),
        "linear_attention, grouped, decay per head": (
            linear_attention,
            inputs([shared, shared, many, (batch, time, 8)], negative=[3]),
            None,
        ),
        "linear_attention, decay per channel": (
            linear_attention,
            inputs([keys, keys, values, keys], negative=[3]),
            None,
        ),
        "delta_rule, decay per head": (delta_rule, delta, None),
        "delta_rule, decay per channel": (delta_rule, (*delta[:4], inputs([keys], negative=[0])[0]), None),
        "linear_recurrence": (
            linear_recurrence,
            inputs([channels, channels], negative=[0]),
            associative_linear_recurrence,
        ),
        "short_convolution": (short_convolution, inputs([channels, (4, 512)]), None),
    }


def training(form, *arguments):
    """Loss and gradients of all arguments; the state counts too."""

    def loss(arguments):
        y, state = form(*arguments)
        return jnp.mean(y**2) + jnp.mean(state**2)

    return jax.value_and_grad(loss)(arguments)


def compare(title, forms, arguments, rounds):
    """Race the forms; each has to agree with the first one."""
    used = {name: functools.partial(training, form) for name, form in forms.items()}
    losses = {name: float(jax.jit(function)(*arguments)[0]) for name, function in used.items()}
    first = next(iter(losses.values()))
    for name, loss in losses.items():
        if not abs(loss / first - 1) < 1e-3:
            raise SystemExit(f"{title}: {name} is wrong")
    rows = race(used, arguments, rounds)
    memory = max(rows[next(iter(rows))]["temporary_mib"], 0.1)
    rows = {name: row | {"memory_ratio": round(row["temporary_mib"] / memory, 2)} for name, row in rows.items()}
    report(title, rows)
    return rows


def growth(results):
    """Per operator and form, the exponents of time and memory in length, from the shortest and the longest."""
    found = {}
    for operator, lengths in results.items():
        short, long = min(lengths), max(lengths)
        for form in lengths[long] if short < long else ():
            pairs = [(lengths[short][form][key], lengths[long][form][key]) for key in ("median_ms", "temporary_mib")]
            exponents = [math.log(max(b, 0.1) / max(a, 0.1)) / math.log(long / short) for a, b in pairs]
            found[f"{operator}, {form}"] = dict(zip(("time", "memory"), (round(x, 2) for x in exponents), strict=True))
    return found


def main():
    options = command_line(
        __doc__.splitlines()[0],
        lengths={"type": int, "nargs": "+", "default": LENGTHS, "help": "tokens"},
        operators={"nargs": "+", "default": [""], "help": "those whose names begin like this"},
        forms={"nargs": "+", "default": ["chunks", "tokens", "associative"], "help": "forms to compare"},
    )
    print(*(f"{name} {value}" for name, value in machine().items()), sep=", ")
    results = {}
    for name in operators(1):
        if not name.startswith(tuple(options.operators)):
            continue
        for time in options.lengths:
            operator, arguments, associative = operators(time)[name]
            forms = {
                "chunks": functools.partial(operator, implementation="xla"),
                "tokens": functools.partial(operator, implementation="reference"),
                "associative": associative,
            }
            forms = {form: function for form, function in forms.items() if form in options.forms and function}
            if forms:
                rows = compare(f"{name}, {time} tokens", forms, arguments, options.rounds)
                results.setdefault(name, {})[time] = rows
    exponents = growth(results)
    for name, found in exponents.items():
        print(f"{name}: time grows as length^{found['time']}, memory as length^{found['memory']}")
    save(options.output, {"rows": results, "exponents": exponents})


if __name__ == "__main__":
    main()
