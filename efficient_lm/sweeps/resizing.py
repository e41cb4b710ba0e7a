"""The size at which a model has a given cost: width or depth first, then the hidden sizes of its channel mixers.

Costs are those of models that were built. Which sizes work is found out by trying: no part is asked for its rules.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from efficient_lm.models.language_model import MOST_LAYERS, LanguageModel
from efficient_lm.sweeps.sizing import Sizable, Size

MULTIPLES = (8, 4, 2, 1)
"""Of which widths and hidden sizes are multiples, the first that lands close enough."""
CLOSE = 0.5
"""Share of the tolerance within which a hidden size need not be a multiple of less."""
SECANTS, EXACT = 5, 1e-4
"""Steps towards the hidden size that costs what it should, and the share by which the cost may be off."""
FURTHEST = 4.0
"""How many times larger or smaller a hidden size may become so that a width or depth fits."""
NARROWEST, WIDEST = 8, 1 << 17
REACH = 256
"""Neighbours of a size that are tried where it does not work."""


class Attempt(NamedTuple):
    """A size that was tried.

    Attributes:
        cost: of the model.
        strain: how far it is from the shape that was asked for, as the logarithm of a ratio; 0 if it has it.
    """

    size: Size
    cost: float
    strain: float = 0.0


@dataclass(frozen=True)
class Target:
    """What a model is to cost.

    Attributes:
        cost: of a model that was built; it grows with every size.
        value: wanted.
        tolerance: by which share of `value` it may be off.
    """

    cost: Callable[[LanguageModel], float]
    value: float
    tolerance: float

    def deviation(self, attempt: Attempt) -> float:
        """By which share of the target an attempt is off."""
        return attempt.cost / self.value - 1

    def met(self, attempt: Attempt) -> bool:
        """Whether an attempt is within the tolerance."""
        return abs(self.deviation(attempt)) <= self.tolerance

    def best(self, attempts: list[Attempt]) -> Attempt | None:
        """The least strained of those that are close enough, else the closest; None of none."""
        met = [attempt for attempt in attempts if self.met(attempt)]
        if met:
            return min(met, key=lambda attempt: (attempt.strain, abs(self.deviation(attempt))))
        return min(attempts, key=lambda attempt: abs(self.deviation(attempt)), default=None)


class Resizer:
    """A candidate's sizes that come nearest to a target. Each returns None where no size works at all."""

    def __init__(self, candidate: Sizable, target: Target):
        self.candidate, self.target = candidate, target

    def by_width(self) -> Attempt | None:
        """Other widths; of a model whose hidden sizes cannot make up for the rest, in multiples of less than 8."""
        return self._first((self.candidate.given.repeats, multiple) for multiple in MULTIPLES)

    def by_width_or_depth(self) -> Attempt | None:
        """As `by_width`, but rather of another depth than of a width that is no multiple of 4."""
        given = self.candidate.given.repeats
        depths = sorted(range(-(-given // 2), 2 * given + 1), key=lambda repeats: abs(math.log(repeats / given)))
        tries = [(given, 8), (given, 4), *((repeats, 8) for repeats in depths[1:]), (given, 2), (given, 1)]
        return self._first(tries)

    def by_depth(self) -> Attempt | None:
        """Other numbers of repeats of the layout."""
        given = self.candidate.given
        around = self._around(lambda count: Size(given.width, count), given.repeats, 1, MOST_LAYERS)
        return self.target.best([self.with_hidden(attempt) for attempt in around])

    def by_hidden(self) -> Attempt | None:
        """Other hidden sizes alone, as far from those that are given as it takes."""
        return self.with_hidden(self._tried(self.candidate.given), math.inf)

    def by_shape(self, aspect: float) -> Attempt | None:
        """Other depths, each with a width of about `aspect` times its layers."""
        period = self.candidate.period

        def shaped(repeats: int) -> Size:
            return Size(self._working_width(aspect * repeats * period, repeats), repeats)

        start = max(1, round(self.candidate.given.width / aspect / period))
        found = []
        for near in self._around(shaped, start, 1, min(MOST_LAYERS // period, int(WIDEST / aspect))):
            attempt = self._at_depth(near.size.repeats, 8)
            if attempt is not None:
                ratio = attempt.size.width / (near.size.repeats * period * aspect)
                found.append(attempt._replace(strain=attempt.strain + abs(math.log(ratio))))
        return self.target.best(found)

    def with_hidden(self, attempt: Attempt, furthest: float = FURTHEST) -> Attempt:
        """The same with hidden sizes by which it comes closer to the target, all changed by one factor."""
        natural = self.candidate.hidden(attempt.size)
        if not natural or self._close(attempt):
            return attempt

        def scaled(factor: float, multiple: int) -> Size:
            sizes = (
                (path, tuple(max(multiple, round(factor * hidden / multiple) * multiple) for hidden in found))
                for path, found in natural
            )
            return attempt.size._replace(hidden=tuple(sizes))

        factor = self._factor(lambda factor: scaled(factor, 1), attempt.cost, furthest)
        if factor is None:
            return attempt
        found = []
        for multiple in MULTIPLES:
            size = scaled(factor, multiple)
            if self.candidate.works(size):
                found.append(self._tried(size)._replace(strain=abs(math.log(max(factor, 1e-9)))))
                if self._close(found[-1]):
                    break
        return min(found, key=lambda attempt: abs(self.target.deviation(attempt)), default=attempt)

    def _factor(self, size: Callable[[float], Size], cost: float, furthest: float) -> float | None:
        """By how much hidden sizes are to be changed: secants, of which one suffices where the cost is linear in them.

        Args:
            size: by factor.
            cost: at factor 1.
        """
        before, factor = (1.0, cost), 2.0
        for _ in range(SECANTS):
            if not self.candidate.works(size(factor)):
                return None
            here = self._tried(size(factor))
            rise = (here.cost - before[1]) / (factor - before[0]) if factor != before[0] else 0.0
            if rise <= 0:
                break
            wanted = factor + (self.target.value - here.cost) / rise
            before, factor = (factor, here.cost), min(max(wanted, 1 / furthest), furthest)
            if abs(here.cost / self.target.value - 1) < EXACT or factor == before[0]:
                break
        return factor

    def _close(self, attempt: Attempt) -> bool:
        return abs(self.target.deviation(attempt)) <= CLOSE * self.target.tolerance

    def _first(self, tries: Iterable[tuple[int, int]]) -> Attempt | None:
        """The first attempt of a depth and a multiple that meets the target, else the closest of all."""
        found = []
        for repeats, multiple in tries:
            attempt = self._at_depth(repeats, multiple)
            if attempt is not None and self.target.met(attempt):
                return attempt
            found += [] if attempt is None else [attempt]
        return self.target.best(found)

    def _at_depth(self, repeats: int, multiple: int) -> Attempt | None:
        """The best width among multiples, each with its hidden sizes."""
        start = max(1, round(self.candidate.given.width / multiple))
        around = self._around(
            lambda count: Size(count * multiple, repeats), start, NARROWEST // multiple, WIDEST // multiple
        )
        return self.target.best([self.with_hidden(attempt) for attempt in around])

    def _around(self, size: Callable[[int], Size], start: int, least: int, most: int) -> list[Attempt]:
        """Of sizes that work, numbered in ascending order: the largest below the target, and the smallest that is not.

        Args:
            start: a number to begin with.
            least, most: the first and the last number.
        """
        below, above = least - 1, most + 1
        found: dict[int, Attempt] = {}
        number, stride = min(max(start, least), most), 1
        while below + 1 < above:
            tried = self._nearest(size, number, below, above)
            if tried is None:
                break
            found[tried] = self._tried(size(tried))
            if found[tried].cost < self.target.value:
                below, number = tried, tried + stride
            else:
                above, number = tried, tried - stride
            stride *= 2
            if below in found and above in found or not below < number < above:
                number = (below + above) // 2
        return [found[end] for end in (below, above) if end in found]

    def _nearest(self, size: Callable[[int], Size], number: int, below: int, above: int) -> int | None:
        """The number between two others that is nearest to one of them and works."""
        for offset in range(min(above - below, REACH)):
            for near in (number + offset, number - offset):
                if below < near < above and self.candidate.works(size(near)):
                    return near
        return None

    def _working_width(self, wanted: float, repeats: int) -> int:
        count = max(1, round(wanted / 8))
        working = self._nearest(lambda count: Size(8 * count, repeats), count, 0, WIDEST // 8 + 1)
        return 8 * (working or count)

    def _tried(self, size: Size) -> Attempt:
        return Attempt(size, self.target.cost(self.candidate.model(size)))
