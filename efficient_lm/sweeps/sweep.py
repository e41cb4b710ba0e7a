"""A sweep from its config to its table. Imports no jax."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from efficient_lm.composition import ConfigRoots, differences, read_yaml
from efficient_lm.errors import ConfigError, ResourceError, UserError
from efficient_lm.sweeps.arms import Arm, Space, arms_of
from efficient_lm.sweeps.axes import Axis
from efficient_lm.sweeps.checking import Checked, Checker, Question
from efficient_lm.sweeps.config import SweepConfig
from efficient_lm.sweeps.display import Display, console, plan_table, result_table
from efficient_lm.sweeps.launchers.base import Launcher
from efficient_lm.sweeps.plans import Drawn, Grid, Plan, too_large
from efficient_lm.sweeps.running import PROGRAM, RUNS, Runner
from efficient_lm.sweeps.study import Study, reading
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
    space = Space.of(config, axes, ConfigRoots.of(config_dirs))
    drawn = config.search.candidates is not None
    candidates = space.samples() if drawn else space.grid()
    arms = arms_of(candidates, space.seeds)
    launcher, question = config.launcher.build(), _question(config, config_dirs)
    checker = (make_checker or Checker)()
    try:
        checked = _checked(arms, question, checker)
        launcher.measured(checked[0].device_bytes)
        _check_memory(arms, checked, launcher)
        out = console()
        total = (config.search.candidates or len(arms)) * len(space.seeds)
        out.print(_announced(config, arms, total, drawn), markup=False)
        out.print(plan_table([group[0] for group in arms], checked, space.keys))
        if config.dry_run:
            return Result(Path(config.dir), [])
        checker.rest()
        if drawn:
            plan: Plan = Drawn(space, config.search, checker, question, launcher.limit_bytes)
        else:
            checker.close()
            plan = Grid(arms, checked, candidates)
        return _run(config, plan, space, launcher, checked, arms, program, config_dirs)
    finally:
        checker.close()
        launcher.close()


def _question(config: SweepConfig, config_dirs: Sequence[str]) -> Question:
    names = dict.fromkeys((*(objective.name for objective in config.objectives), config.metric.name))
    return Question(
        (), tuple(config_dirs), config.budget, config.launcher.counts_memory, config.launcher.remote,
        tuple(names), config.search.prunes, config.name,
    )  # fmt: skip


def _checked(arms: Sequence[Sequence[Arm]], question: Question, checker: Checker) -> list[Checked]:
    """What is known of each arm, by its first seed. Raises `UserError` for those that are wrong."""
    found = list(checker.check(question.of(group[0]) for group in arms))
    faults: dict[str, list[str]] = {}
    for group, each in zip(arms, found, strict=True):
        if isinstance(each, UserError):
            faults.setdefault(str(each), []).append(group[0].name)
    if faults:
        status = next(type(each) for each in found if isinstance(each, UserError))
        shown = [_blamed(fault, names, len(arms)) for fault, names in list(faults.items())[:SHOWN_FAULTS]]
        more = [f"and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
        raise status("\n".join([*shown, *more]))
    seen: dict[str, str] = {}
    for group, each in zip(arms, found, strict=True):
        other = seen.setdefault(repr(each.config), group[0].name)
        if other != group[0].name:
            raise ConfigError(f"{other} and {group[0].name}: the same run twice; leave one out, by exclude or when")
    return found


def _blamed(fault: str, names: Sequence[str], total: int) -> str:
    """A fault and the arms that have it, unless all do."""
    if len(names) == total:
        return fault
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {fault}"


def _check_memory(arms: Sequence[Sequence[Arm]], checked: Sequence[Checked], launcher: Launcher) -> None:
    if launcher.limit_bytes is None:
        return
    large = [
        (group[0].name, each.memory_bytes)
        for group, each in zip(arms, checked, strict=True)
        if (each.memory_bytes or 0) > launcher.limit_bytes
    ]
    if large:
        more = f" (and {len(large) - 1} more)" if len(large) > 1 else ""
        raise ResourceError(f"{large[0][0]}{more}: {too_large(large[0][1], launcher.limit_bytes)}")


def _announced(config: SweepConfig, arms: Sequence[Sequence[Arm]], total: int, drawn: bool) -> str:
    if drawn:
        return f"{total} runs, drawn by {config.search.kind} → {config.dir}; examples of what may come:"
    seeds = f" × {len(arms[0])} seeds" if len(arms[0]) > 1 else ""
    return f"{len(arms)} arms{seeds} → {config.dir}"


def _run(
    config: SweepConfig,
    plan: Plan,
    space: Space,
    launcher: Launcher,
    checked: Sequence[Checked],
    arms: Sequence[Sequence[Arm]],
    program: Sequence[str],
    config_dirs: Sequence[str],
) -> Result:
    folder, out = Path(config.dir), console()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"dir: cannot write to {folder}: {error.strerror}") from error
    study = Study.open(folder, config.identity, [objective.optuna for objective in config.objectives])
    try:
        _check_folders(folder, study, arms if isinstance(plan, Grid) else (), checked)
        study.optuna.pruner = config.search.pruner.build(max(each.steps for each in checked))
        write_atomically(folder / "sweep.yaml", to_yaml(config.dump()))
        display = Display(out, len(plan.names), config.objectives[0])

        def changed(rows: list[Row]) -> None:
            write_table(folder, config.name, space.keys, rows, config.objectives)
            display.changed(rows)

        runner = Runner(
            folder, study, plan, launcher, config.objectives, config.search.prunes, config.restarts,
            config.retry_failed, config_dirs, changed, display.watched if display.watches else None, program,
        )  # fmt: skip
        with reading(study.path), Interruption() as interruption:
            with display.shown():
                ended = runner.run(interruption)
            rows = runner.rows()
        write_table(folder, config.name, space.keys, rows, config.objectives)
        out.print(result_table(lines(rows, config.objectives), space.keys, config.objectives))
        return Result(folder, rows, 0 if ended else interruption.signal or signal.SIGTERM)
    finally:
        study.close()


def _check_folders(folder: Path, study: Study, arms: Sequence[Sequence[Arm]], checked: Sequence[Checked]) -> None:
    """Raises `ConfigError` for a run directory in which an arm would go on with what is another run."""
    trials = study.trials()
    if not arms and not trials and any((folder / RUNS).glob("*/config.yaml")):
        raise ConfigError(
            f"{folder / RUNS}: holds runs of a search whose {study.path.name} is gone; choose another name= or dir="
        )
    for group, each in zip(arms, checked, strict=bool(arms)):
        for arm in group:
            path, trial = folder / RUNS / arm.name / "config.yaml", trials.get(arm.name)
            if not path.is_file() or (trial is not None and trial.state.is_finished()):
                continue
            there = {key: value for key, value in read_yaml(path).items() if key in each.config}
            changed = differences(there, each.config)
            if changed:
                raise ConfigError(
                    f"{path.parent}: holds another run ({'; '.join(changed[:3])}); nothing was touched: choose another "
                    "name= or dir=, or put back what was changed"
                )
