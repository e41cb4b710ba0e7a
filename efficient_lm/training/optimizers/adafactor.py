"""Second moments in factors."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from efficient_lm.models.parameters import Declaration, Parameters
from efficient_lm.spec import Fraction, Positive
from efficient_lm.training.optimizers.base import NonNegative, OptimizerSpec, describe, is_placeholder


class AdafactorState(NamedTuple):
    """Of a matrix, means of squared gradients over outputs (`rows`) and inputs (`columns`), with those axes of size 1;
    of any other parameter the squares in its shape (`full`)."""

    count: jax.Array
    rows: Any
    columns: Any
    full: Any


class AdafactorSpec(OptimizerSpec):
    """Adafactor (Shazeer & Stern 2018, algorithms 4 and 5), with a schedule in place of its own.

    Rows and columns are those of the matrix that a parameter declares, and every layer and expert is a matrix of its
    own, also for the clipping and for the size of the parameter; `optax.adafactor` takes an array's two largest axes.

    Attributes:
        learning_rate: relative to the root mean square of each matrix, where `relative` is true.
        decay_exponent: the second moment's decay rate in step t is ``1 - t ** -decay_exponent``.
        clip: bound of the root mean square of a matrix's direction.
        momentum: decay rate of an average of directions; None keeps none.
        relative: whether a step is as large as the parameter is.
        epsilon: added to squared gradients.
        smallest: the least root mean square that a parameter is taken to have.
    """

    update_size: ClassVar[str] = "parameter"

    kind: Literal["adafactor"] = "adafactor"
    learning_rate: Positive = 1e-2
    weight_decay: NonNegative = 1e-2
    decay_exponent: Annotated[Fraction, Field(gt=0)] = 0.8
    clip: Positive = 1.0
    momentum: Fraction | None = None
    relative: bool = True
    epsilon: Positive = 1e-30
    smallest: Positive = 1e-3

    def direction(self, declarations: Parameters) -> optax.GradientTransformation:
        def init(params: Parameters) -> AdafactorState:
            if is_placeholder(params):
                return AdafactorState(jnp.zeros((), jnp.int32), params, params, params)
            parts = [describe(_zeros(part), declarations, params) for part in ("rows", "columns", "full")]
            return AdafactorState(jnp.zeros((), jnp.int32), *parts)

        def update(grads: Parameters, state: AdafactorState, params: Parameters) -> tuple[Parameters, AdafactorState]:
            count = optax.safe_increment(state.count)
            kept = 1.0 - count.astype(jnp.float32) ** -self.decay_exponent

            def one(declared: Declaration, grad: jax.Array, *rest: Any) -> "_Moved":
                return self._moved(declared, kept, grad, *rest)

            moved = describe(one, declarations, grads, state.rows, state.columns, state.full, params)
            parts = [
                jax.tree.map(lambda leaf, at=at: leaf[at], moved, is_leaf=lambda leaf: isinstance(leaf, _Moved))
                for at in range(4)
            ]
            return parts[0], AdafactorState(count, *parts[1:])

        scaled = optax.GradientTransformation(init, update)
        return scaled if self.momentum is None else optax.chain(scaled, optax.ema(self.momentum, debias=False))

    def _moved(
        self, declared: Declaration, kept: jax.Array, grad: jax.Array, rows: Any, columns: Any, full: Any, param: Any
    ) -> "_Moved":
        square = jnp.square(grad) + self.epsilon
        if declared.matrix is None:
            full = kept * full + (1 - kept) * square
            direction = grad * jax.lax.rsqrt(full)
        else:
            inputs, outputs = declared.matrix
            rows = kept * rows + (1 - kept) * jnp.mean(square, axis=outputs, keepdims=True)
            columns = kept * columns + (1 - kept) * jnp.mean(square, axis=inputs, keepdims=True)
            mean = jnp.mean(rows, axis=inputs, keepdims=True)
            direction = grad * jax.lax.rsqrt(rows / mean) * jax.lax.rsqrt(columns)
        direction = direction / jnp.maximum(1.0, _size(direction, declared) / self.clip)
        if self.relative:
            direction = direction * jnp.maximum(self.smallest, _size(param, declared))
        return _Moved(direction, rows, columns, full)


class _Moved(NamedTuple):
    direction: jax.Array
    rows: Any
    columns: Any
    full: Any


def _zeros(part: str) -> Any:
    """A function of a declaration and its parameter: zeros for a part of the state, or `optax.MaskedNode`."""

    def zeros(declared: Declaration, param: jax.Array) -> Any:
        if (declared.matrix is None) != (part == "full"):
            return optax.MaskedNode()
        gone = () if declared.matrix is None else declared.matrix[1 if part == "rows" else 0]
        return jnp.zeros([1 if axis in gone else size for axis, size in enumerate(param.shape)], param.dtype)

    return zeros


def _size(values: jax.Array, declared: Declaration) -> jax.Array:
    """Root mean square of each matrix, or of each layer's vector."""
    return jnp.sqrt(jnp.mean(jnp.square(values), axis=declared.own_axes, keepdims=True))
