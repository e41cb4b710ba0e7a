"""Which hidden units of a dense channel mixer go to which expert."""

import numpy as np


def universal(activity: np.ndarray, count: int) -> np.ndarray:
    """The `count` units whose mean magnitude in the domain that uses them least is highest: int64, in order.

    `activity` is float ``[domains, hidden]``.
    """
    return np.sort(np.argsort(-activity.min(axis=0), kind="stable")[:count])


def most_active(activity: np.ndarray, count: int) -> np.ndarray:
    """The `count` most active units of each domain, int64 ``[domains, count]``, in order; domains may share units.

    Read-ME (Cai et al. 2024, section 3.1).
    """
    return np.sort(np.argsort(-activity, axis=1, kind="stable")[:, :count], axis=1)


def balanced(activity: np.ndarray) -> np.ndarray:
    """Every unit in one domain, as many in each: int64 ``[domains, hidden / domains]``, in order.

    Greedy: of all pairs of a unit and a domain, the one whose share of the unit's activity is largest comes first, and
    a pair whose unit is taken or whose domain is full is passed over.
    """
    domains, hidden = activity.shape
    share = activity / np.maximum(activity.sum(axis=0), 1e-12)
    room, owner = np.full(domains, hidden // domains), np.full(hidden, -1)
    for pair in np.argsort(-share, axis=None, kind="stable"):
        domain, unit = divmod(int(pair), hidden)
        if owner[unit] < 0 and room[domain]:
            owner[unit] = domain
            room[domain] -= 1
    return np.stack([np.flatnonzero(owner == domain) for domain in range(domains)])
