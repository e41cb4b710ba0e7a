"""The verb `train`."""

import os
import signal
from collections.abc import Sequence
from typing import Any

from efficient_lm.cli.main import Options

ROOT = "train"
SUMMARY = "Trains a model; a run that was stopped goes on when the same command is given again."
HELP = """
Main keys
  run.name= run.dir= run.seed=       which run, where, and its random seed
  train.steps= train.batch_size= train.sequence_length= train.accumulate=
  train.log_every= train.evaluate_every= train.checkpoint_every= train.keep_checkpoints=
  train.keep_every= train.keep_best=   more checkpoints to keep
  train.spike.action= train.rollback.at_most=   what stands out: warn, skip, rollback; how often to go back
  train.batch_schedule= train.sequence_schedule=     sizes before the last: {start: 8, until: 0.2} doubles
  init_from= init_state=all          begins with a model; all: goes on from a run's whole state, under another name
  train.stop_at=     saves and stops after this step, of train.steps; the same command goes on
  train.probes.every=100   train.profile=10:15   tracker=tensorboard | wandb | tensorboard_wandb
  parameterization=mup parameterization.base_width=  a learning rate tuned at that width holds at every width
  optimizer= optimizer.learning_rate= schedule.warmup=    adamw, muon, lion, adafactor, sgd, soap, sophia, ...
  optimizer.state=   float32, bfloat16 or int8: precision of moments; optimizer.groups= treats parameters by role
  train.average.decay=0.999   a moving average of the parameters, for averaged=true of other verbs
  nesting=           sample, joint, sandwich, mixed: smaller models inside are trained too; none: the whole alone
  model.elastic.ffn= model.elastic.heads= ...   their parts, [0.25,0.5,1]
  model.width= model.repeats= model.layout=[...] model.blocks.NAME.mixer.heads=

Examples
  efficient-lm train experiment=quickstart
  efficient-lm train experiment=quickstart run.name=wide model.width=384 mixer.heads=6
  efficient-lm train experiment=moe_tiny nesting=joint 'model.elastic={experts: [0.5,1]}' run.name=nested
  efficient-lm train data=multi_query_recall data.pairs=16 mixer=attention
  efficient-lm train data=files data.source.paths=[my/*.txt] tokenizer=bytes precision=bfloat16
"""


SAMPLE_PROMPT = "My fellow citizens"
OF_A_SWEEP = "EFFICIENT_LM_SWEEP"
"""A variable that runs of a sweep have: nobody reads what is printed at their ends, so no text is generated."""


def run(overrides: Sequence[str], options: Options) -> int:
    """Train from the config that `overrides` compose. Returns 128 + the signal's number if one ended the run early."""
    from efficient_lm.config import load_run_config
    from efficient_lm.training.group import group
    from efficient_lm.training.loop import train

    config, processes = load_run_config(overrides, options.config_dirs), group()
    summary = train(config)
    if processes is None or processes.index == 0:
        print(_outcome(summary))
        print(_rest(summary, config.data.reads_text, processes is None and OF_A_SWEEP not in os.environ))
    stopped_by = summary.get("stopped_by")
    return 128 + signal.Signals[stopped_by] if stopped_by in signal.Signals.__members__ else 0


def _rest(summary: dict[str, Any], reads_text: bool, sampled: bool) -> str:
    """How to go on; of a run that is complete also its sizes, and a text if one process has the whole model."""
    if "stopped_by" in summary:
        return f"stopped by {summary['stopped_by']}; the same command goes on from step {summary['step']}"
    parts = [sizes(summary)] if "sizes" in summary else []
    parts += [_sample(summary["run"])] if reads_text and sampled else []
    return "\n".join([*parts, _next_commands(summary["run"], reads_text)])


def _outcome(summary: dict[str, Any]) -> str:
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    bits, accuracy = summary.get("val_bits_per_byte"), summary.get("val_accuracy")
    held_out = f"; {bits:.3f} bits per byte on held-out text" if bits is not None else ""
    held_out += f"; {accuracy:.1%} of the answers right" if accuracy is not None else ""
    return (
        f"\n{summary['step']:,} steps, {summary['tokens']:,} tokens, {summary['parameters'] / 1e6:.2f} M parameters, "
        f"{minutes} min {seconds} s{held_out}\nrun: {summary['run']} (plots/loss.png, metrics.jsonl, summary.json)"
    )


def sizes(summary: dict[str, Any]) -> str:
    """The models inside, and how to take one out."""
    from efficient_lm.elastic.sizes import table

    rows, run = summary["sizes"], summary["run"]
    cut = " ".join(f"{axis}={part:g}" for axis, part in rows[0]["parts"].items())
    extract = f"efficient-lm extract checkpoint={run} output={run}-small {cut}"
    drawn = all(row["bits_per_byte"] is not None for row in rows)
    return "\n".join(["", table(rows), f"plots/sizes.png; {extract}" if drawn else extract])


def _sample(run: str) -> str:
    from efficient_lm.api import load

    text = load(run).generate(SAMPLE_PROMPT, max_new_tokens=60, temperature=0.7, top_p=0.9)
    return f"\n{SAMPLE_PROMPT} ▸{text}\n"


def _next_commands(run: str, reads_text: bool) -> str:
    if not reads_text:
        return f"next:\n  efficient-lm evaluate checkpoint={run} sequence_length=[64,256,1024]"
    return "\n".join(
        [
            "next:",
            f"  efficient-lm generate checkpoint={run} prompt='The state of the Union is'",
            f"  efficient-lm evaluate checkpoint={run}",
            "  efficient-lm train experiment=quickstart run.name=wide model.width=384 mixer.heads=6",
        ]
    )
