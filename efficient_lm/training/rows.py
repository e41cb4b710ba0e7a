"""Where the rows of a run go: its files, the console and the tracker. Of many processes, process 0 writes."""

import math
from typing import Any

from efficient_lm.config import RunConfig
from efficient_lm.training.probes import PROBES_FILE
from efficient_lm.training.processes import is_main
from efficient_lm.training.progress import Progress
from efficient_lm.training.reporting import Console, MetricsFile, plot_loss
from efficient_lm.training.run_directory import RunDirectory

FORGOTTEN_FILE = "forgotten.jsonl"
"""Rows of steps that the run went back before."""


class Rows:
    """The rows of a run, of which those that come again are dropped when it goes on.

    Args:
        complete: whether the run had nothing left to do; its last evaluation is then done again.
    """

    def __init__(self, config: RunConfig, run: RunDirectory, progress: Progress, complete: bool):
        self._run, self._metrics = run, MetricsFile(run.path)
        self._forgotten, self._probes = MetricsFile(run.path, FORGOTTEN_FILE), MetricsFile(run.path, PROBES_FILE)
        if not is_main():
            return

        def belongs(row: dict[str, Any]) -> bool:
            """Whether a row does not come again, as one of a later rollback does, and the last evaluation of a run."""
            final = complete and row.get("final") and row["step"] == progress.step
            return row.get("rollback", 0) <= progress.rollbacks and not final

        self.console = Console(config.train.steps, progress.step)
        again = self._metrics.resume(progress.step, belongs) + self._probes.resume(progress.step)
        self._forgotten.resume(config.train.steps, belongs)
        self._tracker = config.tracker.start(run.path, config.run.name, config.dump(), progress.step, again)

    def write(self, row: dict[str, Any]) -> None:
        """Log a row of metrics everywhere; numbers that are not finite become null."""
        if not is_main():
            return
        row = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in row.items()
        }
        self._metrics.append(row)
        if "rollback" not in row:
            self.console.show(row)
        self._tracker.log(row, row["step"])

    def write_probe(self, row: dict[str, Any]) -> None:
        """Log what a probe saw of a step."""
        if is_main():
            self._probes.append(row)
            self._tracker.log(row, row["step"])

    def forget_after(self, there: Progress) -> None:
        """Keep rows from after an earlier place apart: the run goes back to it."""
        if is_main():
            for row in self._metrics.cut_after(there.step):
                self._forgotten.append(row | {"rollback": there.rollbacks})
            self._probes.cut_after(there.step)

    def settle(self) -> None:
        """Return when every row of metrics is on disk. Raises `ResourceError`."""
        self._metrics.settle()

    def finish(self, summary: dict[str, Any]) -> None:
        """Plot the loss, and give the tracker a run's summary."""
        if self._metrics.path.exists():
            plot_loss(self._run.path)
        self._tracker.finish(summary)

    def close(self) -> None:
        """Stop the bar, and close the files."""
        if is_main():
            self.console.close()
        for file in (self._metrics, self._probes, self._forgotten):
            file.close()
