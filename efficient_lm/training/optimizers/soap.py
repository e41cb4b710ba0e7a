"""Adam in the eigenbasis of Shampoo's preconditioner."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efficient_lm.models.parameters import Declaration, Parameters
from efficient_lm.spec import Count, Fraction, Positive
from efficient_lm.training.optimizers.base import OptimizerSpec, describe, is_placeholder


class SOAPState(NamedTuple):
    """`first` and `second` moments in the shape of the parameters, the second in the rotated basis; of each side of a
    matrix that is rotated, the average of outer products (`left`, `right`) and its eigenvectors, ``[..., n, n]``.
    """

    count: jax.Array
    first: Any
    second: Any
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any


class SOAPSpec(OptimizerSpec):
    """SOAP (Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", algorithms 3 and 4).

    Adam whose second moment lives in the eigenbases of ``G Gᵀ`` and ``Gᵀ G``; each layer and expert has its own. The
    bases come from the first gradient, which moves nothing yet, and are refreshed by a step of power iteration and a QR
    decomposition. What is not a matrix gets Adam.

    Attributes:
        beta1, beta2: decay rates of the moments; the second one also of the outer products.
        epsilon: added to the root of the second moment.
        interval: steps between refreshments of the bases.
        largest: inputs or outputs beyond which that side of a matrix is not rotated.
    """

    kind: Literal["soap"] = "soap"
    learning_rate: Positive = 1e-3
    beta1: Fraction = 0.95
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8
    interval: Count = 10
    largest: Count = 10_000

    def direction(self, declarations: Parameters) -> optax.GradientTransformation:
        def init(params: Parameters) -> SOAPState:
            if is_placeholder(params):
                return SOAPState(jnp.zeros((), jnp.int32), *[params] * 6)
            sides = [describe(self._zeros(side), declarations, params) for side in (0, 1)]
            zeros = optax.tree.zeros_like(params)
            return SOAPState(jnp.zeros((), jnp.int32), zeros, zeros, *sides, *sides)

        def update(grads: Parameters, state: SOAPState, params: Any = None) -> tuple[Parameters, SOAPState]:
            def one(declared: Declaration, grad: jax.Array, *rest: Any) -> "_Moved":
                return self._moved(declared, state.count, grad, *rest)

            moved = describe(one, declarations, grads, *state[1:])
            parts = [
                jax.tree.map(lambda leaf, at=at: leaf[at], moved, is_leaf=lambda leaf: isinstance(leaf, _Moved))
                for at in range(7)
            ]
            return parts[0], SOAPState(optax.safe_increment(state.count), *parts[1:])

        return optax.GradientTransformation(init, update)

    def _zeros(self, side: int) -> Any:
        """A function of a declaration and its parameter: zeros for the square of a side, or `optax.MaskedNode`."""

        def zeros(declared: Declaration, param: jax.Array) -> Any:
            *many, inputs, outputs = _sizes(declared)
            size = (inputs, outputs)[side]
            if declared.matrix is None or size > self.largest:
                return optax.MaskedNode()
            return jnp.zeros((*many, size, size), param.dtype)

        return zeros

    def _moved(
        self,
        declared: Declaration,
        count: jax.Array,
        grad: jax.Array,
        first: jax.Array,
        second: jax.Array,
        left: Any,
        right: Any,
        left_basis: Any,
        right_basis: Any,
    ) -> "_Moved":
        """One parameter's direction and state after `count` earlier steps. The first one only finds the bases."""
        matrices, bases, waits = _matrices(grad, declared), (left_basis, right_basis), declared.matrix is not None
        begun, steps = (count > 0, jnp.maximum(count, 1)) if waits else (jnp.array(True), count + 1)
        mean = jnp.where(begun, self.beta1 * first + (1 - self.beta1) * grad, first)
        rotated = _rotated(matrices, *bases)
        square = self.beta2 * _matrices(second, declared) + (1 - self.beta2) * jnp.square(rotated)
        corrections = [1 - beta ** steps.astype(jnp.float32) for beta in (self.beta1, self.beta2)]
        root = jnp.sqrt(square / corrections[1]) + self.epsilon
        direction = _rotated_back(_rotated(_matrices(mean, declared), *bases) / corrections[0] / root, *bases)
        direction = jnp.where(begun, _whole(direction, declared), 0.0)
        second = jnp.where(begun, _whole(square, declared), second)
        left, left_basis = self._refreshed(count, left, left_basis, matrices, "...ij,...kj->...ik")
        right, right_basis = self._refreshed(count, right, right_basis, matrices, "...ji,...jk->...ik")
        return _Moved(direction, mean, second, left, right, left_basis, right_basis)

    def _refreshed(self, count: jax.Array, outer: Any, basis: Any, matrices: jax.Array, product: str) -> Any:
        """A side's outer products with a gradient's, and its basis where a new one is due."""
        if isinstance(outer, optax.MaskedNode):
            return outer, basis
        outer = self.beta2 * outer + (1 - self.beta2) * jnp.einsum(product, matrices, matrices)
        choice = jnp.where(count == 0, 0, jnp.where(count % self.interval == 0, 1, 2))
        basis = jax.lax.switch(
            choice,
            [
                lambda outer, basis: jnp.linalg.eigh(outer)[1][..., ::-1],
                lambda outer, basis: jnp.linalg.qr(outer @ basis)[0],
                lambda outer, basis: basis,
            ],
            outer,
            basis,
        )
        return outer, basis


class _Moved(NamedTuple):
    direction: jax.Array
    first: jax.Array
    second: jax.Array
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any


def _sizes(declared: Declaration) -> tuple[int, ...]:
    """``(..., inputs, outputs)`` of the matrices; a parameter that holds none is one column."""
    if declared.matrix is None:
        return declared.size, 1
    inputs, outputs = (math.prod(declared.shape[axis] for axis in axes) for axes in declared.matrix)
    return *(declared.shape[axis] for axis in declared.batch_axes), inputs, outputs


def _order(declared: Declaration) -> tuple[int, ...]:
    if declared.matrix is None:
        return tuple(range(len(declared.shape)))
    return declared.batch_axes + sum(declared.matrix, ())


def _matrices(values: jax.Array, declared: Declaration) -> jax.Array:
    """``[..., inputs, outputs]``."""
    return values.transpose(_order(declared)).reshape(_sizes(declared))


def _whole(matrices: jax.Array, declared: Declaration) -> jax.Array:
    """In the shape of the parameter again."""
    order = _order(declared)
    back = sorted(range(len(order)), key=order.__getitem__)
    return matrices.reshape([declared.shape[axis] for axis in order]).transpose(back)


def _rotated(matrices: jax.Array, left: Any, right: Any) -> jax.Array:
    matrices = matrices if isinstance(left, optax.MaskedNode) else jnp.einsum("...ij,...ik->...jk", left, matrices)
    return matrices if isinstance(right, optax.MaskedNode) else jnp.einsum("...ij,...jk->...ik", matrices, right)


def _rotated_back(matrices: jax.Array, left: Any, right: Any) -> jax.Array:
    matrices = matrices if isinstance(left, optax.MaskedNode) else jnp.einsum("...ij,...jk->...ik", left, matrices)
    return matrices if isinstance(right, optax.MaskedNode) else jnp.einsum("...ij,...kj->...ik", matrices, right)
