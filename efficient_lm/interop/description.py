"""The language in which a family says how its tensors are ours, once for both directions.

A published tensor is made of one or several of our parameters. Each of these is seen through a *view* of our array that
has the published layout (a transpose, a cut, a reshape, never a copy); reading assigns to the views, writing reads from
them. Which axes of a parameter are inputs and which are outputs, its declaration knows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from efficient_lm.models.parameters import Declaration

Layout = Literal["torch", "conv1d", "depthwise", "vector", "rows", "by_head", "same"]
"""How a parameter is stored.

``torch``: ``[out, in]`` as torch's Linear; ``conv1d``: ``[in, out]``; ``depthwise``: ``[channels, 1, taps]`` of ours
``[taps, *channels]``; ``vector``: flattened to one axis; ``rows``: all axes but the first
flattened to one; ``by_head``: ``[1, 1, heads, 1]``; ``same``: as ours is.
"""


STACK = "experts"
"""Leading axis of a parameter that holds one of its kind for each expert."""


@dataclass(frozen=True)
class Source:
    """One of our parameters, or one of the matrices that lie side by side in it.

    Attributes:
        path: dotted, within a layer or the model.
        pick: index along the axis that batches matrices (keys and values, gate and up); None takes all.
        index: which of the parameters that are stacked along a leading axis (one for each expert); None takes all.
    """

    path: str
    pick: int | None = None
    index: int | None = None

    def view(self, array: np.ndarray, declared: Declaration, layout: Layout) -> np.ndarray:
        """The array in the published layout; never a copy."""
        if self.index is not None:
            array, declared = array[self.index], declared.unstacked()
        # What comes before the outputs: the inputs, and an axis of experts before them.
        inputs = len(declared.matrix[0]) if declared.matrix else int(layout == "depthwise")
        inputs += declared.axes[:1] == (STACK,)
        if self.pick is not None:
            array = array[(slice(None),) * inputs + (self.pick,)]
        if layout == "same":
            return array
        if layout == "depthwise":
            return array.reshape(array.shape[0], -1, copy=False).T[:, None]
        if layout == "vector":
            return array.reshape(-1, copy=False)
        if layout == "rows":
            return array.reshape(array.shape[0], -1, copy=False)
        if layout == "by_head":
            return array.reshape(1, 1, -1, 1, copy=False)
        flat = array.reshape(math.prod(array.shape[:inputs]), -1, copy=False)
        return flat.T if layout == "torch" else flat


class Join(Protocol):
    """How several of our parameters make one published tensor."""

    def shape(self, parts: Sequence[np.ndarray], declared: Declaration) -> tuple[int, ...]:
        """Shape of the published tensor."""

    def split(self, tensor: np.ndarray, parts: Sequence[np.ndarray], declared: Declaration) -> Iterator[np.ndarray]:
        """A view of the published tensor for each part, which may cut the part's axes further."""


class Whole:
    """One parameter, one tensor."""

    def shape(self, parts: Sequence[np.ndarray], declared: Declaration) -> tuple[int, ...]:
        return parts[0].shape

    def split(self, tensor: np.ndarray, parts: Sequence[np.ndarray], declared: Declaration) -> Iterator[np.ndarray]:
        yield tensor


WHOLE = Whole()


class Concatenated:
    """One after the other along the last axis."""

    def shape(self, parts: Sequence[np.ndarray], declared: Declaration) -> tuple[int, ...]:
        return (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))

    def split(self, tensor: np.ndarray, parts: Sequence[np.ndarray], declared: Declaration) -> Iterator[np.ndarray]:
        start = 0
        for part in parts:
            yield tensor[..., start : start + part.shape[-1]]
            start += part.shape[-1]


class Rows:
    """One after the other along the first axis."""

    def shape(self, parts: Sequence[np.ndarray], declared: Declaration) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def split(self, tensor: np.ndarray, parts: Sequence[np.ndarray], declared: Declaration) -> Iterator[np.ndarray]:
        start = 0
        for part in parts:
            yield tensor[start : start + part.shape[0]]
            start += part.shape[0]


class Interleaved:
    """In turn along the last axis: the first value of each, then the second of each, and so on."""

    def shape(self, parts: Sequence[np.ndarray], declared: Declaration) -> tuple[int, ...]:
        return (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))

    def split(self, tensor: np.ndarray, parts: Sequence[np.ndarray], declared: Declaration) -> Iterator[np.ndarray]:
        for place in range(len(parts)):
            yield tensor[..., place :: len(parts)]


class InterleavedByHead:
    """For each head, its rows of the first parameter, then of the second, and so on; `axis` counts the heads."""

    def __init__(self, axis: str = "heads"):
        self.axis = axis

    def shape(self, parts: Sequence[np.ndarray], declared: Declaration) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def split(self, tensor: np.ndarray, parts: Sequence[np.ndarray], declared: Declaration) -> Iterator[np.ndarray]:
        heads, start = declared.shape[declared.axes.index(self.axis)], 0
        grouped = tensor.reshape(heads, -1, *tensor.shape[1:], copy=False)
        for part in parts:
            rows = part.shape[0] // heads
            yield grouped[:, start : start + rows]
            start += rows


@dataclass(frozen=True)
class Tensor:
    """A published tensor.

    Attributes:
        name: in the published format; in a layer, what follows the layer's prefix.
        sources: what it is made of.
        layout: of each of them.
        join: how they make one.
        aliases: other names it is published under.
        pieces: names of the tensors that hold its rows, where it is published in several; one for each source. Where
            one ends and the next begins is free.
        by: path of the parameter whose axes the join counts; the first source if empty.
        each: whether there is one such tensor for each index along the leading axis of its parameters; ``{}`` in its
            names stands for the index.
    """

    name: str
    sources: tuple[Source, ...]
    layout: Layout
    join: Join = WHOLE
    aliases: tuple[str, ...] = ()
    pieces: tuple[str, ...] = ()
    by: str = ""
    each: bool = False

    def prefixed(self, prefix: str) -> "Tensor":
        """The same with a prefix to its names."""
        aliases, pieces = (tuple(prefix + name for name in names) for names in (self.aliases, self.pieces))
        return replace(self, name=prefix + self.name, aliases=aliases, pieces=pieces)

    def numbered(self, count: int) -> list["Tensor"]:
        """The tensor itself, or with `each` the `count` that it stands for."""
        if not self.each:
            return [self]
        return [
            replace(
                self,
                name=self.name.format(index),
                sources=tuple(replace(source, index=index) for source in self.sources),
                aliases=tuple(name.format(index) for name in self.aliases),
                each=False,
            )
            for index in range(count)
        ]

    def views(self, arrays: Sequence[np.ndarray], declared: Sequence[Declaration]) -> list[np.ndarray]:
        """Each source in the published layout."""
        return [
            source.view(array, declaration, self.layout)
            for source, array, declaration in zip(self.sources, arrays, declared, strict=True)
        ]

    def pairs(
        self, tensor: np.ndarray, views: Sequence[np.ndarray], declared: Declaration
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(view of ours, view of `tensor`) of equal shape, which together cover the tensor."""
        for ours, theirs in zip(views, self.join.split(tensor, views, declared), strict=True):
            yield ours.reshape(theirs.shape, copy=False), theirs


def linear(theirs: str, ours: str, pick: int | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear map, as torch's Linear stores them."""
    return (
        Tensor(f"{theirs}.weight", (Source(f"{ours}.weight", pick),), "torch"),
        Tensor(f"{theirs}.bias", (Source(f"{ours}.bias", pick),), "vector"),
    )


def each(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same, one for each expert; ``{}`` in their names stands for its number."""
    return tuple(replace(tensor, each=True) for tensor in tensors)


def fused(
    theirs: str, ours: Sequence[tuple[str, int | None]], layout: Layout, join: Join = WHOLE
) -> tuple[Tensor, Tensor]:
    """Weight and bias of one or several linear maps (path, pick) of one input, stored as one."""
    weights, biases = (tuple(Source(f"{path}.{part}", pick) for path, pick in ours) for part in ("weight", "bias"))
    return Tensor(f"{theirs}.weight", weights, layout, join), Tensor(f"{theirs}.bias", biases, "vector", join)


def norm(theirs: str, ours: str) -> tuple[Tensor, Tensor]:
    """Scale and bias of a norm."""
    return (
        Tensor(f"{theirs}.weight", (Source(f"{ours}.scale"),), "vector"),
        Tensor(f"{theirs}.bias", (Source(f"{ours}.bias"),), "vector"),
    )


def renamed(tensors: Sequence[Tensor], *names: tuple[str, str]) -> tuple[Tensor, ...]:
    """The same tensors, each also published under a name in which one part is another: pairs (part, other part)."""
    return tuple(
        replace(tensor, aliases=(*tensor.aliases, *(tensor.name.replace(*pair) for pair in names)))
        for tensor in tensors
    )  # fmt: skip


def table(theirs: str, ours: str, layout: Layout = "same", aliases: Sequence[str] = ()) -> tuple[Tensor]:
    """A parameter by itself: an embedding, a head, a vector."""
    return (Tensor(theirs, (Source(ours),), layout, aliases=tuple(aliases)),)
