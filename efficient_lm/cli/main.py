"""``efficient-lm VERB key=value ...``: finds the verb, runs it, and turns faults into a line and an exit status."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from efficient_lm.cli.help import VERBS, overview, verb_help
from efficient_lm.errors import ConfigError, ResourceError, UserError, causes, nearest, storage_fault
from efficient_lm.runtime import configure_logging, keep_compiled_programs
from efficient_lm.training.group import refuse_many

INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """What every verb understands.

    Attributes:
        config_dirs: folders of further config groups and choices.
    """

    config_dirs: tuple[str, ...] = ()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(f"{message}; see --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _run(arguments), "--traceback" in arguments)


def guarded(run: Callable[[], int], show_traceback: bool = False) -> int:
    """The exit status of `run`; a fault becomes a line on stderr and its status."""
    try:
        status = run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has seen enough (``| head``); Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        fault = error if isinstance(error, UserError) else _resources(error) or _implementation(error)
        if fault is None or show_traceback:
            traceback.print_exc()
        if fault is not None:
            _print_fault(fault)
        return 1 if fault is None else fault.status


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        if verb.startswith("-") or "=" in verb:
            raise ConfigError(f"{verb}: the verb comes first: efficient-lm VERB key=value ...; {nearest('', VERBS)}")
        raise ConfigError(f"{verb}: no such verb; {nearest(verb, VERBS)}")
    options = _parser(verb).parse_intermixed_args(rest)
    module = importlib.import_module(f"efficient_lm.cli.{verb}")
    if options.help:
        print(verb_help(verb, module, options.config_dir))
    elif options.cfg:
        _print_config(verb, module, options)
    else:
        keep_compiled_programs()
        configure_logging()
        if verb != "train":
            refuse_many(verb)
        return module.run(options.overrides, Options(tuple(options.config_dir))) or 0
    return 0


def _parser(verb: str) -> _Parser:
    parser = _Parser(prog=f"efficient-lm {verb}", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config-dir", action="append", default=[])
    parser.add_argument("--traceback", action="store_true")
    return parser


def _print_config(verb: str, module: ModuleType, options: argparse.Namespace) -> None:
    if module.ROOT is None:
        raise ConfigError(f"{verb}: has no config to print")
    if hasattr(module, "compose_job"):
        print(module.compose_job(options.overrides, options.config_dir), end="")
        return
    from efficient_lm.composition import compose

    print(compose(module.ROOT, options.overrides, options.config_dir).to_yaml(), end="")


def _resources(error: Exception) -> ResourceError | None:
    """A disk that refused, or full memory, wherever it showed up."""
    fault = storage_fault(error)
    if fault is not None:
        files = [str(cause.filename) for cause in causes(error) if getattr(cause, "filename", None)]
        where = f" ({files[0]})" if files else ""
        return ResourceError(f"{fault}{where}; mend that and run the same command again")
    if any(isinstance(cause, MemoryError) or "RESOURCE_EXHAUSTED" in str(cause) for cause in causes(error)):
        return ResourceError(
            "out of memory: try a smaller train.batch_size, a larger train.accumulate, model.remat=full, "
            "or precision=bfloat16"
        )
    return None


def _implementation(error: Exception) -> ConfigError | None:
    """An operator whose named implementation cannot honour the config, or run on this machine."""
    from kernels_pallas.dispatch import Unsupported

    return next((ConfigError(str(cause)) for cause in causes(error) if isinstance(cause, Unsupported)), None)


def _print_fault(fault: UserError) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{red}error:{plain} {fault}", file=sys.stderr)
