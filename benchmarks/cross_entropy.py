"""Linear cross-entropy of `kernels_pallas` against plain forms: loss with gradients in x and the head, and loss alone.

Run: python benchmarks/cross_entropy.py [--rounds 15] [--output benchmarks/results/cross_entropy.json]

`xla.default_chunk` is chosen from these tables. A line is timed only after its loss agreed with the plain one.
"""

import functools

import jax
import jax.numpy as jnp
from timing import command_line, machine, race, report, save

from kernels_pallas.linear_cross_entropy import linear_cross_entropy, xla


def picked_logit(x, w, labels, weights):
    """logsumexp minus the picked logit, all logits kept for the gradient by autodiff."""
    logits = x @ w
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked))


def log_softmax(x, w, labels, weights):
    """The textbook form."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(x @ w), labels[:, None], axis=-1)[:, 0]
    return -jnp.sum(weights * chosen)


def summed(chunk, x, w, labels, weights):
    """This package's form."""
    return linear_cross_entropy(x, w, labels, weights, chunk=chunk, implementation="xla").loss_sum


def inputs(tokens, width, vocabulary):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width))
    w = jax.random.normal(keys[1], (width, vocabulary)) * width**-0.5
    return x, w, jax.random.randint(keys[2], (tokens,), 0, vocabulary), jnp.ones(tokens)


def tied(form, x, w, labels, weights):
    """The head given as the transpose of an embedding."""
    return form(x, w.T, labels, weights)


def compare(title, forms, arguments, rounds, gradient=True):
    wanted = next(iter(forms.values()))(*arguments)
    for name, form in forms.items():
        if not abs(form(*arguments) / wanted - 1) < 1e-4:
            raise SystemExit(f"{title}: {name} is wrong")
    used = {n: jax.value_and_grad(f, argnums=(0, 1)) if gradient else f for n, f in forms.items()}
    rows = race(used, arguments, rounds)
    report(title, rows)
    return rows


def main():
    options = command_line(__doc__.splitlines()[0])
    print(*(f"{name} {value}" for name, value in machine().items()), sep=", ")
    results = {}
    for shape in ((2048, 256, 4096), (2048, 256, 260), (4096, 512, 1024), (512, 256, 32768)):
        chunks = sorted({256, 512, 1024, shape[0], xla.default_chunk(shape[0], shape[2], jax.default_backend())})
        forms = {"logsumexp - picked": picked_logit, "log_softmax": log_softmax}
        forms |= {f"chunks of {n}": functools.partial(summed, n) for n in chunks if n <= shape[0]}
        for gradient in (True, False):
            title = f"{'loss and gradients' if gradient else 'loss'}, float32, N D V = {shape}"
            results[title] = compare(title, forms, inputs(*shape), options.rounds, gradient)
    x, w, labels, weights = inputs(2048, 256, 4096)
    title = "loss and gradients, tied head, float32, N D V = (2048, 256, 4096)"
    forms = {"logsumexp - picked": functools.partial(tied, picked_logit)}
    forms |= {f"chunks of {n}": functools.partial(tied, functools.partial(summed, n)) for n in (512, 2048)}
    results[title] = compare(title, forms, (x, w.T, labels, weights), options.rounds)
    save(options.output, results)


if __name__ == "__main__":
    main()
