"""The verb `train`."""

from collections.abc import Sequence

from efficient_lm.cli.main import Options

ROOT = "train"
SUMMARY = "Trains a model; a run that was stopped goes on when the same command is given again."
HELP = """
Main keys
  run.name= run.dir= run.seed=       which run, where, and its random seed
  train.steps= train.batch_size= train.sequence_length= train.accumulate=
  train.log_every= train.evaluate_every= train.checkpoint_every= train.keep_checkpoints=
  optimizer.learning_rate= schedule.warmup=
  model.width= model.repeats= model.layout=[...] model.blocks.NAME.mixer.heads=

Examples
  efficient-lm train experiment=quickstart
  efficient-lm train experiment=quickstart run.name=wide model.width=384 mixer.heads=6
  efficient-lm train data=files data.source.paths=[my/*.txt] tokenizer=bytes precision=bfloat16
"""


def run(overrides: Sequence[str], options: Options) -> None:
    """Train from the config that `overrides` compose."""
    from efficient_lm.config import load_run_config
    from efficient_lm.training.loop import train

    train(load_run_config(overrides, options.config_dirs))
