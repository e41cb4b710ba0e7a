"""Steps that a run is to forget, and when it does so by itself."""

from dataclasses import dataclass

from efficient_lm.spec import Count, Natural, Spec


class RollbackSpec(Spec):
    """When a run goes back to a checkpoint by itself; also for spikes, if `train.spike.action` is ``rollback``.

    Attributes:
        after: steps in a row whose loss or gradient is no number.
        at_most: so many times in a run; 0 never does.
    """

    after: Count = 10
    at_most: Natural = 0


@dataclass(frozen=True)
class Harm:
    """What a run is to forget.

    Attributes:
        first, last: steps.
        reason: what happened there, for people.
    """

    first: int
    last: int
    reason: str
