"""Made-up run directories, as `train` and `sweep` leave them."""

import json
import math

import pytest

from efficient_lm.untrusted import to_yaml


@pytest.fixture
def made_run(tmp_path):
    """``made_run(name, ...)`` → the folder of a run of 20 logged steps whose loss falls to `end`.

    Keywords: `mixer`, `width`, `rate`, `seed`, `accuracy` (of a synthetic task), any figure of the summary, and
    `folder` in place of the test's own.
    """

    def make(name, end=3.0, *, mixer="attention", width=64, rate=1e-3, seed=0, accuracy=None, folder=None, **figures):
        run = (folder or tmp_path) / name
        run.mkdir(parents=True)
        model = {"width": width, "blocks": {"layer": {"mixer": {"kind": mixer}}}}
        config = {"model": model, "optimizer": {"kind": "adamw", "learning_rate": rate}}
        config |= {"run": {"name": name, "dir": str(run), "seed": seed}, "train": {"steps": 200}}
        (run / "config.yaml").write_text(to_yaml(config))
        rows = []
        for step in range(10, 201, 10):
            loss = end + 5 * math.exp(-step / 30)
            rows.append({"step": step, "tokens": 100 * step, "loss": loss, "seconds": 0.5 * step, "learning_rate": rate,
                         "tokens_per_second": 200.0})  # fmt: skip
            if step % 50 == 0:
                score = {"val_loss": loss + 0.1}
                score |= {} if accuracy is None else {"val_accuracy": accuracy * step / 200}
                rows.append({"step": step, "tokens": 100 * step, **score})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = {"run": str(run), "step": 200, "tokens": 20_000, "seconds": 100.0, "val_loss": end + 0.1}
        summary |= {"parameters": width * 1000, "training_flops": 6e3 * width * 20_000, "cache_bytes": width * 10}
        summary |= {} if accuracy is None else {"val_accuracy": accuracy}
        (run / "summary.json").write_text(json.dumps(summary | figures))
        return run

    return make


@pytest.fixture
def made_sweep(tmp_path, made_run):
    """``made_sweep(name, {run: keywords}, **more rows)`` → the folder of a sweep over mixers, rates and seeds."""

    def make(runs, name="sweep", rows=()):
        folder, table = tmp_path / name, []
        for run, said in runs.items():
            end = made_run(run, folder=folder / "runs", **said).name and said.get("end", 3.0)
            choices = {"mixer": said.get("mixer", "attention"), "optimizer.learning_rate": said.get("rate", 1e-3)}
            table.append({"name": run, "choices": choices, "seed": said.get("seed", 0), "state": "finished",
                          "run": f"runs/{run}", "figures": {"val_loss": end + 0.1}, "reason": ""})  # fmt: skip
        (folder / "table.json").write_text(json.dumps({"sweep": name, "axes": [], "rows": [*table, *rows]}))
        return folder

    return make
