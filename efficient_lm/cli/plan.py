"""The verb `plan`."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from efficient_lm.cli.main import Options
from efficient_lm.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from efficient_lm.config import PlanConfig, RunConfig
    from efficient_lm.training.machines import Machine

ROOT = "plan"
SUMMARY = "Counts parameters, FLOPs, memory and time of a training config, here or on a machine that is not there."
HELP = """
Takes every key of `train`, and
  target=            cpu, gpu or tpu: what is planned for; by default this machine
  topology=          v5p:4x4x4, v5e:2x4, v6e:4x4 | 8 (so many H200s) | h100:8 | h200:8x8 (hosts, GPUs of each)
  devices=           so many virtual CPU devices in place of this machine's: what each of them would hold
  shardings=         whether to list where every parameter lives; by default where there are several devices
  decode=            whether the step that decodes a token is compiled too
  largest_batch=     whether the largest batch that fits is looked for, which compiles up to six more steps
  output=            a JSON file for the figures

Steps are compiled for the machine, and nothing is allocated. Machines that are not there need the compilers of
pip install 'efficient-lm[ahead]' (in a checkout: make ahead). Exit status 6: the step does not fit in the memory.

Examples
  efficient-lm plan experiment=transformer_350m
  efficient-lm plan model.width=1024 model.repeats=24 mixer.heads=16 train.sequence_length=2048
  efficient-lm plan parallelism=fsdp_tensor devices=8
  efficient-lm plan experiment=transformer_1b target=gpu topology=8 parallelism=fsdp largest_batch=true
  efficient-lm plan experiment=transformer_1b topology=v5p:2x2x1 decode=true output=plan.json
"""

UNREAD = {"data": {"source": {"kind": "sotu"}}, "tokenizer": {"kind": "bytes"}}
"""Stand in for sections that name no file yet; a plan opens neither."""


def run(overrides: Sequence[str], options: Options) -> None:
    """Count what the config that `overrides` compose would cost; `ResourceError` if the machine has not the memory."""
    # Before jax: a compiler that finds no room warns of what is then refused in our words.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    asked, config = _configs(overrides, options)

    from efficient_lm.training.accounting import plan
    from efficient_lm.training.fitting import largest_batch, with_fitting_accumulate
    from efficient_lm.training.machines import machine
    from efficient_lm.training.plan_table import lines
    from efficient_lm.training.setup import with_vocabulary

    where = machine(asked.target, asked.topology, asked.devices)
    if asked.largest_batch and where.memory is None:
        raise ConfigError(f"largest_batch: the memory of {where} is not known; give a topology, such as h200:8")
    if config.model.vocab_size is None:
        config = with_vocabulary(config, config.tokenizer.build())
    divided = config if where.topology is None else with_fitting_accumulate(config, where)
    figures = plan(divided, where, asked.decode)
    if divided is not config:
        figures["changed"] = {"train.accumulate": [config.train.accumulate, divided.train.accumulate]}
    if asked.largest_batch:
        found = largest_batch(divided, where, figures["bytes"]["peak"])
        figures["largest_batch"] = found and found._asdict()
    shardings = len(where.devices) > 1 if asked.shardings is None else asked.shardings
    print("\n".join(lines(divided, figures, where, shardings)))
    if asked.output is not None:
        _write(asked.output, figures, where)
    _check_memory(divided, figures, where)


def _configs(overrides: Sequence[str], options: Options) -> "tuple[PlanConfig, RunConfig]":
    from efficient_lm.composition import compose
    from efficient_lm.config import PlanConfig, RunConfig
    from efficient_lm.validation import validate

    values = compose(ROOT, overrides, options.config_dirs, optional=tuple(UNREAD)).values
    asked = validate(PlanConfig, {key: values.pop(key) for key in PlanConfig.model_fields if key in values})
    if "tokenizer" not in values and values["model"].get("vocab_size") is None:
        raise ConfigError("model.vocab_size: null takes the tokenizer's, and tokenizer.path is not given; give either")
    return asked, validate(RunConfig, {**UNREAD, **values})


def _check_memory(config: "RunConfig", figures: dict[str, Any], where: "Machine") -> None:
    """Refuse what does not fit, with the smallest change that would do. Raises `ResourceError`."""
    from efficient_lm.training.fitting import remedy
    from efficient_lm.training.plan_table import size

    sizes = figures["bytes"]
    if where.memory is None or sizes["peak"] <= where.memory:
        return
    owner = "this machine" if where.topology is None and where.target.platform == "cpu" else "each device"
    needs = f"a step needs {size(sizes['peak'])} of {owner}, which has {size(where.memory)}"
    found = remedy(config, where)
    if found is not None:
        raise ResourceError(f"{needs}; nearest that fits: {' '.join(found.keys)} ({size(found.peak)})")
    state = sizes["parameters"] + sizes["gradients"] + sizes["optimizer"]
    raise ResourceError(
        f"{needs}; neither one row at a time nor model.remat=full nor parallelism=fsdp makes it fit "
        f"(parameters, gradients and optimizer alone are {size(state)}): take more or larger devices"
    )


def _write(path: str, figures: dict[str, Any], where: "Machine") -> None:
    """All figures as JSON, with the machine and versions."""
    from efficient_lm.runtime import surroundings
    from efficient_lm.training.reporting import write_json_atomically

    machine = {"name": str(where), "topology": where.topology, "devices": len(where.devices), "memory": where.memory}
    placed = [each._asdict() for each in figures["placements"]]
    facts = {"machine": machine, "versions": surroundings("jax", "jaxlib")["versions"]}
    write_json_atomically(path, facts | figures | {"placements": placed})
