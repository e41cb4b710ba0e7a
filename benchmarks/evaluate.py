"""Tokens scored per second: this framework's `evaluate`, and transformers on torch, same weights and same windows.

    export PYTHONPATH=.                                          # where the package is not installed
    python benchmarks/evaluate.py --torch PYTHON                 # a Llama in the shape of SmolLM2-135M, random weights
    python benchmarks/evaluate.py --torch PYTHON --layers 4      # smaller; also --width, --heads, ...
    python benchmarks/evaluate.py --torch PYTHON --model FOLDER  # any Llama in Hugging Face format

Disjoint windows of random tokens, the first token of each unscored, as `model(ids, labels=ids)` does it; the losses
must agree. The arms take turns for several rounds: ratios are of times in the same round, so that what else the machine
does meets all of them. Arms:

- ``framework``: everything `evaluate` does for a text that is encoded already, with its own choice of batch;
- ``torch_N``: `LlamaForCausalLM` with N windows at a time (see evaluate_torch.py), in a process of its own.

Utilisation is not given: the peak of a CPU is not known. FLOPs count matrix products and causal attention (halved).
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from timing import surroundings

from efficient_lm.api import Model, from_hf
from efficient_lm.config import load_run_config
from efficient_lm.data.store import TokenStore
from efficient_lm.data.tokenizers import AbsentTokenizer
from efficient_lm.evaluation.bits_per_byte import make_scorer
from efficient_lm.evaluation.text import evaluate_documents
from efficient_lm.evaluation.windows import WindowSpec
from efficient_lm.models.parameters import count_parameters

HERE = Path(__file__).parent
TOLERANCE = 1e-4
"""Relative difference of the losses above which the arms do not compute the same."""


def write_model(options: argparse.Namespace, folder: Path) -> Path:
    """A Llama with random weights in Hugging Face format; its logits spread as a trained model's do."""
    mixer = {"kind": "attention", "heads": options.heads, "kv_heads": options.kv_heads}
    mixer["position"] = {"kind": "rotary", "theta": 100000.0}
    block = {"mixer": mixer, "ffn": {"kind": "swiglu", "hidden": options.hidden}}
    config = load_run_config(["run.name=benchmark"])
    changes = {"width": options.width, "vocab_size": options.vocabulary, "repeats": options.layers, "tied": True}
    changes |= {"blocks": {"layer": block}, "layout": ["layer"], "embedding_std": 0.1}
    model = type(config.model).model_validate({**config.model.dump(), **changes})
    config = config.model_copy(update={"model": model})
    params = jax.jit(model.build().init)(jax.random.key(0))
    return Model(config, params, AbsentTokenizer()).to_hf(folder / "model")


def framework_arm(model: Model, windows: np.ndarray) -> tuple[Callable[[], float], float]:
    """A round of the framework's evaluation in seconds, and its loss."""
    count, length = windows.shape
    store = TokenStore(
        windows.reshape(-1).astype(np.uint32), length * np.arange(count + 1), np.full(count, length), 0, 0, None
    )
    scorer, spec = make_scorer(model.model, model.dtype), WindowSpec(sequence_length=length, begin="none")

    def score() -> float:
        return evaluate_documents(scorer, model.params, store, np.arange(count), spec)["loss"]

    loss = score()

    def run() -> float:
        start = time.perf_counter()
        score()
        return time.perf_counter() - start

    return run, loss


def torch_arms(
    options: argparse.Namespace, folder: Path, windows: Path
) -> tuple[dict[str, Any], dict[str, float], str]:
    """By batch size, a round of torch's evaluation in seconds, and its loss; torch's versions."""
    command = [options.torch, str(HERE / "evaluate_torch.py"), str(folder), str(windows)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def ask(line: str | None) -> Any:
        if line is not None:
            process.stdin.write(f"{line}\n")
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"the torch process ended with status {process.wait()}")
        return json.loads(answer)

    versions = ask(None)["versions"]
    losses = {f"torch_{size}": ask(str(size))["loss"] for size in options.torch_batch}
    arms = {f"torch_{size}": lambda size=size: ask(str(size))["seconds"] for size in options.torch_batch}
    return arms, losses, versions


def alternate(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round; the arm that begins changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(arms[name]())
    return seconds


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return what is kept."""
    with tempfile.TemporaryDirectory() as name:
        folder = options.model or write_model(options, Path(name))
        model = from_hf(folder)
        shape = (options.windows, options.time)
        windows = np.random.default_rng(0).integers(0, model.model.spec.vocab_size, shape, dtype=np.int32)
        np.save(Path(name) / "windows.npy", windows)
        run, loss = framework_arm(model, windows)
        arms, losses, versions = {"framework": run}, {"framework": loss}, None
        if options.torch:
            theirs, their_losses, versions = torch_arms(options, folder, Path(name) / "windows.npy")
            arms, losses = arms | theirs, losses | their_losses
        if max(losses.values()) - min(losses.values()) > TOLERANCE * loss:
            raise SystemExit(f"the arms do not score the same: losses {losses}")
        seconds = alternate(arms, options.rounds)
    results = {}
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(times, seconds["framework"], strict=True)]
        results[name] = {
            "tokens_per_second": round(windows.size / statistics.median(times), 1),
            "tokens_per_second_best": round(windows.size / min(times), 1),
            "framework_speed_over_this": round(statistics.median(ratios), 4),
            "framework_speed_over_this_best": round(min(times) / min(seconds["framework"]), 4),
            "loss": losses[name],
            "seconds": times,
        }
        shown = {key: value for key, value in results[name].items() if key != "seconds"}
        print(f"{name:10}", "  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    counts = {"parameters": count_parameters(model.model.declarations)}
    counts["flops"] = model.model.flops_per_token(options.time) * windows.size
    return {"arms": results, **counts, "torch": versions}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"width": 576, "layers": 30, "heads": 9, "kv-heads": 3, "hidden": 1536, "vocabulary": 49152}
    for name, size in (sizes | {"windows": 4, "time": 1024, "rounds": 7}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--model", type=Path, help="a folder in Hugging Face format, instead of random weights")
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch and transformers")
    parser.add_argument("--torch-batch", type=int, nargs="+", default=[1, 4], help="windows at a time, an arm for each")
    parser.add_argument("--output", type=Path, help="file of the results; default: by device in results/")
    return parser.parse_args()


def main() -> None:
    options = parse()
    before = surroundings("jax", "jaxlib", "flax")
    results = report(options)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    settings["torch"] = options.torch is not None
    output = options.output or HERE / "results" / f"evaluate_{jax.default_backend()}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**before, "settings": settings, **results}, indent=1) + "\n")
    print(f"kept in {output}")


if __name__ == "__main__":
    main()
