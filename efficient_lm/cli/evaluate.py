"""The verb `evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficient_lm.cli.main import Options
from efficient_lm.errors import ConfigError

if TYPE_CHECKING:
    from efficient_lm.api import Model
    from efficient_lm.config import EvaluateConfig

ROOT = "evaluate"
SUMMARY = "Measures bits per byte on text, accuracy on synthetic tasks, and runs lm-eval tasks."
HELP = """
Main keys
  checkpoint=        a run directory (its newest checkpoint), runs/NAME/checkpoints/STEP, a Hugging Face folder, a GGUF
  text=              a file, or [several]: .txt, .jsonl (also .gz, .xz, .zst), .parquet
  data=              other data, of which the validation part is read; without either, the run's own
  data.KEY=          the run's own data with another value
  sequence_length=   tokens per window; by default as in training. Of a synthetic task also [several], for a table
  stride=            less than sequence_length: windows overlap, and only their new tokens are scored
  begin=             document: a begin token in front, every token and each end scored; none: the bare text
  limit=             at most so many windows or rows, and so many examples of each task
  tasks=             of lm-eval: names, YAML files or folders; without text and data, they alone are run
  fewshot=           worked examples before each question
  submodel=          0.5: the smaller model inside with such a part of what it is trained to be smaller along;
                     submodel.ffn=0.5: of this
  averaged=true      the moving average that the run kept of its parameters (train.average)
  skipping=          which layers a token runs: uniform, confidence, ...; what it computed is among the figures
  diagnostics=true   recurrent states, decay and the entropy of attention by layer, on a few rows of data
  selection=         of depth rules that choose tokens of a row: top_k, causal as when decoding, or both
  attention_rank=true   the rank of attention maps by layer, on 50 rows of data
  routing=true       loads and drops of experts, tokens and domains (text=[a,b]) that go with them, Super Experts
  batch_size=        windows or requests at a time; by default what suits the device
  output=            a JSON file for the results

Examples
  efficient-lm evaluate checkpoint=runs/quickstart
  efficient-lm evaluate checkpoint=runs/quickstart text=[speech.txt,letters.jsonl.gz] stride=64 output=scores.json
  efficient-lm evaluate checkpoint=runs/recall sequence_length=[64,256,1024] data.pairs=16
  efficient-lm evaluate checkpoint=runs/quickstart skipping=uniform skipping.layers=4
  efficient-lm evaluate checkpoint=smollm2/ tasks=[arc_easy,tasks/mine.yaml] limit=200
"""


def run(overrides: Sequence[str], options: Options) -> None:
    """Evaluate as the config that `overrides` compose says."""
    from efficient_lm.composition import compose
    from efficient_lm.config import EvaluateConfig
    from efficient_lm.validation import validate

    values = compose(ROOT, overrides, options.config_dirs).values
    changes = _changes(values)
    config = validate(EvaluateConfig, values)
    if config.output is not None:
        _check_output(Path(config.output))
    if config.tasks is not None:
        # Before anything else is computed: it says so if lm-eval is not installed.
        import efficient_lm.evaluation.lm_eval  # noqa: F401

    from efficient_lm.api import load
    from efficient_lm.training.reporting import write_json_atomically

    model = load(config.checkpoint, config.submodel, config.averaged).skip(config.skipping)
    if changes:
        config = config.model_copy(update={"data": model.config.data.changed(changes)})
    results = evaluate(model, config)
    if config.output is not None:
        write_json_atomically(config.output, results)
        print(f"kept in {config.output}")


def evaluate(model: "Model", config: "EvaluateConfig") -> dict[str, Any]:
    """Evaluate, print tables, and return what `output` keeps."""
    from efficient_lm.evaluation import report

    if config.selection is not None:
        model = model.decided("top_k" if config.selection == "both" else config.selection)
    results: dict[str, Any] = {"checkpoint": config.checkpoint, "step": model.step}
    results |= {"text": None, "answers": None, "tasks": None}
    if model.skipping is not None:
        results["skipping"] = model.skipping.dump()
    print(f"{config.checkpoint}, step {model.step}")
    last = config.sequence_length[-1] if isinstance(config.sequence_length, tuple) else config.sequence_length
    if config.tasks is None or config.text is not None or config.data is not None:
        part, scores = _scores(model, config)
        results[part] = scores
        print(report.SCORES[part](scores))
        if config.selection == "both":
            _, causal = _scores(model.decided("causal"), config)
            results["causal"] = {part: causal, "layers": model.depth_decisions(config.data, last)}
            print(report.decisions_report(results["causal"]["layers"]))
            print(report.SCORES[part](causal))
    if config.diagnostics:
        results["diagnostics"] = model.diagnose(config.data, last)
        print(report.diagnostics_report(results["diagnostics"]))
    if config.attention_rank:
        results["attention_rank"] = model.attention_rank(config.data, last)
        print(report.attention_rank_report(results["attention_rank"]))
    if config.routing:
        results["routing"] = _routing(model, config, last)
    if config.tasks is not None:
        from efficient_lm.evaluation.lm_eval import run_tasks

        results["tasks"] = run_tasks(
            model, (config.tasks,) if isinstance(config.tasks, str) else config.tasks,
            fewshot=config.fewshot, limit=config.limit, sequence_length=config.sequence_length,
            batch_size=config.batch_size,
        )  # fmt: skip
        print(report.task_report(results["tasks"]))
    return results


def _scores(model: "Model", config: "EvaluateConfig") -> tuple[str, dict[str, Any]]:
    """Whether text or answers are scored, and what `Model.evaluate` says of them."""
    paths = (config.text,) if isinstance(config.text, str) else config.text
    scores = model.evaluate(
        paths or config.data, config.sequence_length, config.batch_size,
        stride=config.stride, begin=config.begin, limit=config.limit,
    )  # fmt: skip
    reads_text = paths is not None or (config.data or model.config.data).reads_text
    return "text" if reads_text else "answers", scores


def _routing(model: "Model", config: "EvaluateConfig", sequence_length: int | None) -> dict[str, Any]:
    """Measure and print what routers and experts do, also since the checkpoints that are kept."""
    from efficient_lm.evaluation.routing_report import routing_text
    from efficient_lm.experts import ROWS, earlier_parameters, routing

    earlier = earlier_parameters(config.checkpoint, model)
    found = routing(model, config.text, config.data, sequence_length, config.limit or ROWS, earlier)
    print(routing_text(found))
    return found


def _changes(values: dict[str, Any]) -> dict[str, Any]:
    """What a command line says of the run's own data, taken out of the config's values."""
    data = values.get("data")
    if data is None or "kind" in data or "source" in data:
        return {}
    if values.get("text") is not None:
        raise ConfigError("text: data is given too; leave one of them out")
    values["data"] = None
    return data


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"output: '{path}' is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"output: there is no folder '{path.parent}'")
