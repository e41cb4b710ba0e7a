"""Plans for accelerators that are not there: memory of each device, what they send, what does not fit."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """``plan(*keys)`` → exit status, figures, and what was said of faults; in a process of its own."""
    folder = tmp_path_factory.mktemp("plans")

    def planned(*keys):
        output = folder / f"{len(list(folder.iterdir()))}.json"
        command = [sys.executable, "-m", "efficient_lm", "plan", *keys, f"output={output}"]
        environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert output.exists(), done.stderr[-2000:]
        return done.returncode, json.loads(output.read_text()), done.stderr

    return planned


@pytest.mark.parametrize(
    ("keys", "devices", "memory"),
    [(["topology=v5p:2x2x1"], 4, 95e9), (["target=gpu", "topology=8"], 8, 141e9)],
    ids=["v5p", "h200"],
)
def test_transformer_1b(plan, keys, devices, memory):
    status, figures, said = plan("experiment=transformer_1b", *keys, "decode=true")
    assert status == 0 and said == ""
    sizes, parameters = figures["bytes"], figures["parameters"]["total"]
    assert figures["machine"]["devices"] == devices and figures["machine"]["memory"] == memory
    assert sizes["parameters"] == 4 * parameters and sizes["optimizer"] == pytest.approx(8 * parameters, rel=1e-6)
    assert 16 * parameters < sizes["peak"] < memory
    # Each device sends its gradients once; with more micro-batches than divide, it is planned with fewer.
    sent = sum(row["bytes"] for row in figures["collectives"].values())
    assert sent == pytest.approx(2 * 4 * parameters * (devices - 1) / devices, rel=0.05)
    assert figures.get("changed") == (None if devices == 4 else {"train.accumulate": [128, 64]})
    assert [term["name"] for term in figures["time"]["terms"]] == ["compute", "memory", "links"]
    assert 4 * parameters < figures["decode"]["bytes"]["peak"] < sizes["peak"]


def test_the_largest_batch_fits_and_the_next_does_not(plan):
    keys = ["experiment=quickstart", "nesting=none", "topology=v5e:1x1", "train.batch_size=64"]
    _, figures, _ = plan(*keys, "largest_batch=true")
    found = figures["largest_batch"]
    assert found["rows"] > 64 and 0.9 * 16e9 < found["peak"] <= 16e9
    status, _, said = plan(*keys[:3], f"train.batch_size={2 * found['batch_size']}")
    assert status == 6 and "each device, which has 16.00 GB; nearest that fits: train.accumulate=" in said


@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:4"])
def test_what_does_not_fit_is_refused_with_what_would_do(plan, topology):
    keys = ["experiment=transformer_350m", "train.batch_size=256", "train.accumulate=2"]
    status, figures, said = plan(*keys, f"topology={topology}")
    assert status == 6 and figures["bytes"]["peak"] > figures["machine"]["memory"]
    assert said.startswith("error: a step needs ") and "nearest that fits: " in said and len(said.splitlines()) == 1
