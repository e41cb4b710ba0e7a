"""Parameters that declare themselves, and modules turned into plain dicts of arrays.

A module is defined with Flax NNX, built once without allocating, and from then on its parameters are a nested dict.
What a parameter is (its logical axes, whether it is decayed, which axes form a matrix, how it starts) is said where it
is created and read from there by sharding, optimizers, elastic slicing and accounting: nothing is guessed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Parameters = dict[str, Any]
"""Nested dict of arrays."""


class Initializer:
    """How a parameter starts.

    Attributes:
        draw: the distribution its values are made from, ``normal`` (unit, truncated at 3), ``uniform`` (from 0 to 1) or
            ``none``.
    """

    draw: str = "none"

    def values(self, shape: tuple[int, ...], drawn: jax.Array | None) -> jax.Array:
        """float32 of this shape, from as many drawn values of the same shape."""
        raise TypeError(f"{type(self).__name__} does not define values")


@dataclass(frozen=True)
class Normal(Initializer):
    """Normal with standard deviation `scale`, truncated at three of them."""

    scale: float
    draw = "normal"

    def values(self, shape: tuple[int, ...], drawn: jax.Array | None) -> jax.Array:
        return self.scale * drawn

    def __str__(self) -> str:
        return f"normal({self.scale:.4g})"


@dataclass(frozen=True)
class Constant(Initializer):
    """One value everywhere."""

    value: float

    def values(self, shape: tuple[int, ...], drawn: jax.Array | None) -> jax.Array:
        return jnp.full(shape, self.value, jnp.float32)

    def __str__(self) -> str:
        return f"constant({self.value:.4g})"


@dataclass(frozen=True)
class Uniform(Initializer):
    """``through(u)`` with u uniform between `low` and `high`; `through` is a function of a module, or None."""

    low: float
    high: float
    through: Callable[[jax.Array], jax.Array] | None = None
    draw = "uniform"

    def values(self, shape: tuple[int, ...], drawn: jax.Array | None) -> jax.Array:
        u = self.low + (self.high - self.low) * drawn
        return u if self.through is None else self.through(u)

    def __str__(self) -> str:
        name = self.through.__name__ if self.through else "uniform"
        return f"{name}({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Pattern(Initializer):
    """Values that follow from the place alone: ``function(shape)``, a function of a module."""

    function: Callable[[tuple[int, ...]], jax.Array]

    def values(self, shape: tuple[int, ...], drawn: jax.Array | None) -> jax.Array:
        return self.function(shape)

    def __str__(self) -> str:
        return self.function.__name__


_TRUNCATED_STD = 0.98658
"""Standard deviation of a unit normal truncated at 3."""

ZEROS = Constant(0.0)
ONES = Constant(1.0)


@dataclass(frozen=True)
class Initialization:
    """The model's rule for matrices.

    Attributes:
        std: standard deviation of every matrix; None takes ``fan_in ** -0.5``.
        residual_scale: factor for matrices that write into the residual stream, ``(2 * layers) ** -0.5`` as in GPT-2
            (Radford et al. 2019, section 2.3), so that the stream's variance does not grow with depth.
    """

    std: float | None = None
    residual_scale: float = 1.0

    def matrix(self, fan_in: int) -> Normal:
        """For a matrix that reads the residual stream or a hidden layer."""
        return Normal(self.std or fan_in**-0.5)

    def output(self, fan_in: int) -> Normal:
        """For a matrix that writes into the residual stream."""
        start = self.matrix(fan_in)
        return replace(start, scale=start.scale * self.residual_scale)


@dataclass(frozen=True)
class Declaration:
    """What a parameter says of itself.

    Attributes:
        shape: its shape.
        axes: a logical name for each axis (`embed`, `mlp`, `heads`, `kv_heads`, `head_dim`, `vocab`, `layers`, ...).
        decay: whether weight decay applies.
        matrix: (input axes, output axes) of the matrix it holds, other axes being a batch of matrices; None if none.
        initializer: how it starts.
        sums: where it holds no matrix: the axes that what it makes of its input sums over, as that of a vector whose
            product with the input is a number; none of those it is only multiplied by or added to.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    decay: bool
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None
    initializer: Initializer
    sums: tuple[int, ...] = ()

    @property
    def inputs(self) -> tuple[int, ...]:
        """Axes that each of its outputs sums over."""
        return self.sums if self.matrix is None else self.matrix[0]

    @property
    def outputs(self) -> tuple[int, ...]:
        """Axes of its outputs; in the one that is left there are matrices side by side."""
        rest = tuple(axis for axis in range(len(self.shape)) if axis not in self.sums)
        return rest if self.matrix is None else self.matrix[1]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Axes along which it is many: those beside its matrix, or, where it holds none, layers and experts."""
        if self.matrix is not None:
            return tuple(axis for axis in range(len(self.shape)) if axis not in sum(self.matrix, ()))
        return tuple(axis for axis, name in enumerate(self.axes) if name in ("layers", "experts"))

    @property
    def own_axes(self) -> tuple[int, ...]:
        """All other axes: those of one of the many."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.batch_axes)

    def stacked(self, count: int, axis: str = "layers") -> "Declaration":
        """The declaration of `count` such parameters in one array with a leading axis of this name."""
        shifted = self.matrix and tuple(tuple(place + 1 for place in side) for side in self.matrix)
        sums = tuple(place + 1 for place in self.sums)
        return replace(self, shape=(count, *self.shape), axes=(axis, *self.axes), matrix=shifted, sums=sums)

    def unstacked(self) -> "Declaration":
        """The declaration of one of the parameters in an array with a leading axis `layers`."""
        shifted = self.matrix and tuple(tuple(axis - 1 for axis in side) for side in self.matrix)
        sums = tuple(axis - 1 for axis in self.sums)
        return replace(self, shape=self.shape[1:], axes=self.axes[1:], matrix=shifted, sums=sums)


def parameter(
    axes: Mapping[str, int],
    initializer: Initializer,
    *,
    decay: bool = False,
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    sums: tuple[int, ...] = (),
) -> nnx.Param:
    """A float32 parameter that carries its declaration; `Blueprint.init` gives it its first values.

    `axes` maps each logical axis, in order, to its size.
    """
    shape = tuple(axes.values())
    declaration = Declaration(shape, tuple(axes), decay, matrix, initializer, sums)
    return nnx.Param(jnp.zeros(shape, jnp.float32), declaration=declaration)


class Blueprint:
    """A module's definition, split once from its arrays.

    Calling ``blueprint(params)`` inside a trace gives the module holding those arrays.
    """

    def __init__(self, build: Callable[[], nnx.Module]):
        self.graph, self.template, self.rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
        declared = jax.tree.map(
            lambda leaf: leaf.get_metadata("declaration"),
            self.template,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        self.declarations: Parameters = nnx.to_pure_dict(declared)

    def init(self, key: jax.Array) -> Parameters:
        """Fresh parameters: nested dict of float32 arrays.

        All values of one distribution come from one draw that is cut into pieces: a draw for each parameter takes XLA
        many times as long to compile.
        """
        table = [declared for _, declared in parameter_table(self.declarations)]
        sizes = {kind: sum(d.size for d in table if d.initializer.draw == kind) for kind in ("normal", "uniform")}
        drawn = {
            "normal": jax.random.truncated_normal(key, -3.0, 3.0, (sizes["normal"],), jnp.float32) / _TRUNCATED_STD,
            "uniform": jax.random.uniform(jax.random.fold_in(key, 1), (sizes["uniform"],), jnp.float32),
        }

        def start(declared: Declaration) -> jax.Array:
            kind = declared.initializer.draw
            if kind == "none":
                return declared.initializer.values(declared.shape, None)
            piece, drawn[kind] = drawn[kind][: declared.size], drawn[kind][declared.size :]
            return declared.initializer.values(declared.shape, piece.reshape(declared.shape))

        return map_declarations(start, self.declarations)

    def __call__(self, params: Parameters) -> Any:
        state = jax.tree.map(lambda leaf: leaf, self.template)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graph, state, self.rest)


def is_declaration(leaf: object) -> bool:
    """For ``jax.tree.map(..., is_leaf=is_declaration)`` over a tree of declarations."""
    return isinstance(leaf, Declaration)


def map_declarations(function: Callable[[Declaration], Any], declarations: Parameters) -> Any:
    """Apply `function` to every declaration of a nested dict."""
    return jax.tree.map(function, declarations, is_leaf=is_declaration)


def count_parameters(declarations: Parameters) -> int:
    """Number of values in a nested dict of declarations."""
    return sum(declaration.size for _, declaration in parameter_table(declarations))


def decay_mask(declarations: Parameters) -> Parameters:
    """Whether each parameter is decayed, in the shape of the parameters."""
    return map_declarations(lambda declaration: declaration.decay, declarations)


def parameter_table(declarations: Parameters) -> list[tuple[str, Declaration]]:
    """(dotted path, declaration) of every parameter."""
    leaves = jax.tree.leaves_with_path(declarations, is_leaf=is_declaration)
    return [(".".join(step.key for step in path), leaf) for path, leaf in leaves]
