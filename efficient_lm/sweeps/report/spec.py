"""What `configs/report.yaml` says."""

from typing import Annotated

from pydantic import Field

from efficient_lm.spec import Listing, Spec

Name = Annotated[str, Field(min_length=1)]


class ReportConfig(Spec):
    """A report.

    Attributes:
        runs: a run directory, a sweep, a folder of runs or a pattern, or several.
        output: the folder to write; None: `report` in the one folder that `runs` names.
        title: of the page; None: the name of what `runs` names.
    """

    runs: Name | Annotated[Listing[Name], Field(min_length=1)]
    output: Name | None = None
    title: Name | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """All that `runs` names."""
        return (self.runs,) if isinstance(self.runs, str) else self.runs
