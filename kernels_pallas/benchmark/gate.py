"""A form is timed only if it computes the right thing: against the definition at small sizes, and at full ones.

Measured is the relative root mean square of the difference; the bounds are those the tests of kernels hold.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.benchmark import forms
from kernels_pallas.benchmark.cases import Case

OUTPUT, GRADIENT, DECAY = 5e-3, 8e-3, 2e-2
"""Bounds for bfloat16 inputs: of outputs, of gradients, and of those of decays, steps and strengths."""
DECAYS = ("dt", "A", "log_decay", "log_a", "beta", "sinks")
SINGLE = 2e-3
"""For float32 inputs, whose products a GPU may round to 11 bits."""


def wrong(case: Case, implementation: str) -> list[str]:
    """What is wrong with an implementation, in words; empty if nothing is."""
    small, gradients = case.small, bool(case.call.training)
    arrays = small.inputs()
    wide = {name: _widened(value) for name, value in arrays.items()}
    wanted = forms.compiled(small, "reference", gradients)(wide)
    return differences(forms.compiled(small, implementation, gradients)(arrays), wanted, case.dtype)


def differences(got: object, wanted: object, dtype: str) -> list[str]:
    """Where two results of a form are further apart than they may be, in words."""
    found = []
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True)
    for (path, one), other in pairs:
        apart, most = error(one, other), bound(jax.tree_util.keystr(path), dtype)
        if not apart <= most:
            found.append(f"{jax.tree_util.keystr(path, simple=True)} is off by {apart:.2g} (at most {most:.2g})")
    return found


def bound(path: str, dtype: str) -> float:
    """The largest error of a result at this path of a form's results."""
    if dtype == "float32":
        return SINGLE
    name = path.split("'")[-2] if "'" in path else ""
    return OUTPUT if not name else DECAY if name in DECAYS else GRADIENT


def error(got, wanted) -> float:
    """Relative root mean square of a difference, in float64; NaN where either is not a number."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return float(np.sqrt(np.mean((got - wanted) ** 2)) / max(np.sqrt(np.mean(wanted**2)), 1e-6))


def _widened(value: jax.Array) -> jax.Array:
    return value.astype(jnp.float32) if value.dtype == jnp.bfloat16 else value
