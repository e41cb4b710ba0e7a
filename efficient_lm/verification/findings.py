"""What a verification found, a line each."""

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from efficient_lm.errors import UserError


class State(enum.StrEnum):
    """How bad a finding is: a fault is what a run should never show, a warning what its owner should know."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: a word or two.
        text: what was found.
    """

    what: str
    state: State
    text: str


def guarded(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that meets what a user could mend ends with it as a fault."""
    try:
        yield from check()
    except UserError as error:
        yield Finding(what, State.FAULT, str(error))


def table(findings: list[Finding]) -> str:
    """A line per finding, and how many there are of each state."""
    width = max(len(finding.what) for finding in findings)
    lines = [f"{finding.what:<{width}}  {finding.state:<7}  {finding.text}" for finding in findings]
    counts = [f"{sum(finding.state == state for finding in findings)} {state}" for state in State]
    return "\n".join([*lines, ", ".join(counts)])


def has_fault(findings: list[Finding]) -> bool:
    """Whether anything is wrong."""
    return any(finding.state == State.FAULT for finding in findings)
