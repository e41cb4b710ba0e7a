"""A sweep from its config to its table. Imports no jax."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from efficient_lm.composition import ConfigRoots, differences, read_yaml
from efficient_lm.errors import ConfigError, ResourceError, UserError
from efficient_lm.sweeps.arms import Arm, Space, arms_of
from efficient_lm.sweeps.axes import Axis
from efficient_lm.sweeps.checking import Checked, Checker, Known, Question
from efficient_lm.sweeps.config import SweepConfig
from efficient_lm.sweeps.display import Display, checks_watched, console, plan_table, result_table
from efficient_lm.sweeps.plans import Drawn, Grid, Plan, too_large
from efficient_lm.sweeps.running import PROGRAM, RUNS, Runner
from efficient_lm.sweeps.study import STUDY_FILE, Study, reading
from efficient_lm.sweeps.table import Row, lines, write_table
from efficient_lm.training.interruption import Interruption
from efficient_lm.training.reporting import write_atomically
from efficient_lm.untrusted import to_yaml

SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Result:
    """What a sweep has come to.

    Attributes:
        rows: a run each.
        stopped_by: the signal that ended it early; 0: none did.
    """

    folder: Path
    rows: list[Row]
    stopped_by: int = 0


def run_sweep(
    config: SweepConfig,
    axes: Sequence[Axis],
    config_dirs: Sequence[str] = (),
    program: Sequence[str] = PROGRAM,
    make_checker: Callable[[], Checker] | None = None,
) -> Result:
    """Check every arm, print what will run, run what has not, and print what came out.

    Args:
        axes: of every arm (see `config.read_sweep`).
        program: what ``train`` and its overrides are appended to.
        make_checker: makes what looks at candidates; None: a process of its own.

    Raises:
        ConfigError: an arm that is not valid or differs in nothing, a folder that has another sweep.
        ResourceError: a candidate that does not fit in memory, a disk that refuses.
    """
    sweep = _Sweep(config, Space.of(config, axes, ConfigRoots.of(config_dirs)), config_dirs, program)
    checker, study = (make_checker or Checker)(), sweep.study() if sweep.begun else None
    try:
        checked = sweep.check(checker, {} if study is None else study.known())
        if config.dry_run:
            return Result(sweep.folder, [])
        study = study or sweep.study()
        checked = sweep.learned(study, checked)
        checker.rest()
        return sweep.run(study, sweep.plan(checker, checked), checked)
    finally:
        checker.close()
        sweep.launcher.close()
        if study is not None:
            study.close()


class _Sweep:
    """A sweep's parts."""

    def __init__(self, config: SweepConfig, space: Space, config_dirs: Sequence[str], program: Sequence[str]):
        self.config, self.space, self.folder = config, space, Path(config.dir)
        self._config_dirs, self._program, self._out = tuple(config_dirs), program, console()
        self.drawn = config.search.candidates is not None
        self.candidates = space.samples() if self.drawn else space.grid()
        self.arms = arms_of(self.candidates, space.seeds)
        self.launcher = config.launcher.build()
        names = dict.fromkeys((*(objective.name for objective in config.objectives), config.metric.name))
        self._question = Question(
            (), self._config_dirs, config.budget, config.launcher.counts_memory, config.launcher.remote,
            tuple(names), config.search.prunes, config.name,
        )  # fmt: skip

    @property
    def begun(self) -> bool:
        """Whether there is a study already."""
        return (self.folder / STUDY_FILE).exists()

    def study(self) -> Study:
        """Its state. Raises `ConfigError` if the folder has another one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"dir: cannot write to {self.folder}: {error.strerror}") from error
        return Study.open(self.folder, self.config.identity, [each.optuna for each in self.config.objectives])

    def check(self, checker: Checker, before: Mapping[str, Mapping[str, Any]]) -> list[Checked]:
        """What is known of each arm, by its first seed; said as a table.

        Args:
            before: what was known when the sweep was begun.

        Raises:
            UserError: an arm that is wrong, two that are the same run, one that does not fit in memory.
        """
        known = {name: Known(tuple(told["overrides"]), **_without(told, "overrides")) for name, told in before.items()}
        firsts = [group[0] for group in self.arms]
        answers = checker.check(self._question.of(arm, known.get(arm.name)) for arm in firsts)
        found = checks_watched(self._out, answers, len(firsts))
        _check_valid(firsts, found)
        self.launcher.measured(found[0].known.device_bytes)
        _check_memory(firsts, found, self.launcher.limit_bytes)
        total, seeds = len(self.arms), len(self.space.seeds)
        said = f"{total} arms" + (f" × {seeds} seeds" if seeds > 1 else "") + f" → {self.folder}"
        if self.drawn:
            total = self.config.search.candidates * seeds
            said = f"{total} runs, drawn by {self.config.search.kind} → {self.folder}; examples of what may come:"
        self._out.print(said, markup=False)
        self._out.print(plan_table(firsts, found, self.space.keys))
        return found

    def learned(self, study: Study, checked: Sequence[Checked]) -> list[Checked]:
        """The same, with what was known first: by this process, or by another that has begun the sweep meanwhile."""
        if self.drawn:
            return list(checked)
        names = [group[0].name for group in self.arms]
        study.learn({name: each.known._asdict() for name, each in zip(names, checked, strict=True)})
        known = study.known()
        return [
            replace(each, known=each.known._replace(overrides=tuple(known[name]["overrides"])))
            for name, each in zip(names, checked, strict=True)
        ]

    def plan(self, checker: Checker, checked: Sequence[Checked]) -> Plan:
        """Which arms there are."""
        if self.drawn:
            return Drawn(self.space, self.config.search, checker, self._question, self.launcher.limit_bytes)
        checker.close()
        return Grid(self.arms, checked, self.candidates)

    def run(self, study: Study, plan: Plan, checked: Sequence[Checked]) -> Result:
        """Run until every arm has ended or a signal comes, and print what came out."""
        config, out = self.config, self._out
        self._check_folders(study, checked)
        study.optuna.pruner = config.search.pruner.build(max(each.steps for each in checked))
        write_atomically(self.folder / "sweep.yaml", to_yaml(config.dump()))
        display = Display(out, len(plan.names), config.objectives[0])

        def changed(rows: list[Row]) -> None:
            write_table(self.folder, config.name, self.space.keys, rows, config.objectives)
            display.changed(rows)

        runner = Runner(
            self.folder, study, plan, self.launcher, config.objectives, config.search.prunes, config.restarts,
            config.retry_failed, self._config_dirs, changed, display.watched if display.watches else None,
            self._program,
        )  # fmt: skip
        with reading(study.path), Interruption() as interruption:
            with display.shown():
                ended = runner.run(interruption)
            rows = runner.rows()
        write_table(self.folder, config.name, self.space.keys, rows, config.objectives)
        out.print(result_table(lines(rows, config.objectives), self.space.keys, config.objectives))
        return Result(self.folder, rows, 0 if ended else interruption.signal)

    def _check_folders(self, study: Study, checked: Sequence[Checked]) -> None:
        """Raises `ConfigError` for a run directory in which an arm would go on with what is another run."""
        trials, runs = study.trials(), self.folder / RUNS
        if self.drawn:
            if not trials and any(runs.glob("*/config.yaml")):
                raise ConfigError(f"{runs}: of a search whose {STUDY_FILE} is gone; choose another name= or dir=")
            return
        for group, each in zip(self.arms, checked, strict=True):
            for arm in group:
                path, trial = runs / arm.name / "config.yaml", trials.get(arm.name)
                if not path.is_file() or (trial is not None and trial.state.is_finished()):
                    continue
                there = {key: value for key, value in read_yaml(path).items() if key in each.config}
                changed = differences(there, each.config)
                if changed:
                    raise ConfigError(
                        f"{path.parent}: holds another run ({'; '.join(changed[:3])}); nothing was touched: choose "
                        "another name= or dir=, or put back what was changed"
                    )


def _check_valid(arms: Sequence[Arm], found: Sequence[Checked | UserError]) -> None:
    """Raises `UserError` for arms that are wrong, and for two that are the same run."""
    faults: dict[str, list[str]] = {}
    for arm, each in zip(arms, found, strict=True):
        if isinstance(each, UserError):
            faults.setdefault(str(each), []).append(arm.name)
    if faults:
        status = next(type(each) for each in found if isinstance(each, UserError))
        shown = [_blamed(fault, names, len(arms)) for fault, names in list(faults.items())[:SHOWN_FAULTS]]
        more = [f"and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
        raise status("\n".join([*shown, *more]))
    seen: dict[str, str] = {}
    for arm, each in zip(arms, found, strict=True):
        other = seen.setdefault(repr(each.config), arm.name)
        if other != arm.name:
            raise ConfigError(f"{other} and {arm.name}: the same run twice; leave one out, by exclude or when")


def _blamed(fault: str, names: Sequence[str], total: int) -> str:
    """A fault and the arms that have it, unless all do."""
    if len(names) == total:
        return fault
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {fault}"


def _check_memory(arms: Sequence[Arm], checked: Sequence[Checked], limit: float | None) -> None:
    """Raises `ResourceError` for an arm that does not fit by itself."""
    sizes = [(arm.name, each.known.memory_bytes or 0) for arm, each in zip(arms, checked, strict=True)]
    large = [(name, size) for name, size in sizes if limit is not None and size > limit]
    if large:
        more = f" (and {len(large) - 1} more)" if len(large) > 1 else ""
        raise ResourceError(f"{large[0][0]}{more}: {too_large(large[0][1], limit)}")


def _without(told: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key != name}
