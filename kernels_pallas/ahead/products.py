"""Counting the matrix products of a traced function: what it computes, before any compiler has changed it."""

import math
from typing import Any

import jax
from jax.extend import core


def product_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> float:
    """FLOPs of all matrix products and convolutions in one call, over all devices, two for each multiplication.

    Loops count as often as they run, and once where that is not known; of a conditional the branch with the most. What
    is recomputed for a backward pass counts. Kernels count by the cost they declare, or by their body and grid.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval, parameters["dimension_numbers"]
            outputs = kernel.shape[numbers.rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel.shape) / outputs
        elif name == "ragged_dot_general" or name == "ragged_dot":
            rows, width = equation.invars[0].aval.shape[-2:]
            total += 2.0 * rows * width * equation.outvars[0].aval.shape[-1]
        elif name == "pallas_call":
            total += _kernel(parameters)
        elif name == "cond":
            total += max(map(product_flops, parameters["branches"]))
        else:
            total += _repeats(name, parameters) * sum(map(product_flops, _inside(parameters)))
    return total


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _kernel(parameters: dict[str, Any]) -> float:
    estimate = parameters.get("cost_estimate")
    if estimate is not None:
        return float(estimate.flops)
    grid = [size for size in parameters["grid_mapping"].grid if isinstance(size, int)]
    return math.prod(grid) * product_flops(parameters["jaxpr"])


def _repeats(name: str, parameters: dict[str, Any]) -> int:
    """How often what is inside an equation runs: in a loop, or by devices that each have their part."""
    if name == "scan":
        return parameters["length"]
    if name == "shard_map":
        sizes = dict(parameters["mesh"].shape)
        return math.prod(sizes[axis] for axis in parameters.get("manual_axes", sizes))
    return 1


def _inside(parameters: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(list(parameters.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns"))
    return [leaf for leaf in leaves if hasattr(leaf, "eqns") or hasattr(getattr(leaf, "jaxpr", None), "eqns")]
