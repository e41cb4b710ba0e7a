"""Few shapes for sequences of any length: each one compiled is worth seconds of a program's time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHORTEST = 64


class Group(NamedTuple):
    """Sequences that are scored together, as `members`, in an array of `rows` × `time`."""

    members: np.ndarray
    rows: int
    time: int


def length_bucket(length: int, longest: int) -> int:
    """The next of 64, 96, 128, 192, 256, ... (powers of two, and halfway between), but no more than `longest`."""
    power = max(SHORTEST, 1 << (length - 1).bit_length())
    halfway = power * 3 // 4
    return min(halfway if SHORTEST < halfway and length <= halfway else power, longest)


def count_bucket(count: int, most: int) -> int:
    """The next of 64, 256, 1024, ..., but no more than `most`."""
    size = SHORTEST
    while size < count:
        size *= 4
    return min(size, most)


def group_by_length(lengths: Sequence[int] | np.ndarray, tokens: int, most_rows: int, longest: int) -> list[Group]:
    """Sequences in groups of similar length, the longest first, so that memory never runs out late.

    Args:
        lengths: of the sequences, none above `longest`; equal ones keep their order.
        tokens: a group has at most so many, padding included, unless it is a single sequence.
        most_rows: a group has at most so many sequences.
        longest: length that no shape exceeds.

    Returns:
        Groups; `rows` is a power of two, or what `most_rows` and `tokens` allow at most.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    while start < len(order):
        time = length_bucket(int(lengths[order[start]]), longest)
        most = max(1, min(most_rows, tokens // time))
        members = order[start : start + most]
        rows = min(1 << (len(members) - 1).bit_length(), most)
        groups.append(Group(members, rows, time))
        start += len(members)
    return groups
