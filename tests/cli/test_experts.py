"""The verbs upcycle, merge and extract, and the routing that evaluate shows, as they are typed."""

import json

import jax
import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.api import Model
from efficient_lm.cli import main as cli
from efficient_lm.config import load_run_config
from efficient_lm.training.loop import train
from efficient_lm.training.setup import with_vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two texts, and a run directory `dense` of a tiny model that reads bytes."""
    root = tmp_path_factory.mktemp("experts")
    rng = np.random.default_rng(0)
    for name, letters in (("law", "abcdefgh "), ("code", "(){}=;01 ")):
        lines = ["".join(rng.choice(list(letters), 40)) for _ in range(40)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    options = ["tokenizer=bytes", "model.width=16", "model.repeats=2", "mixer.heads=2", "train.sequence_length=32"]
    options += ["data=files", f"data.source.paths={root / 'law.jsonl'}", "data.holdout_every=4", "ffn.hidden=16"]
    config = load_run_config([*options, "model.init_std=0.4", "model.embedding_std=1.0", "run.name=dense"])
    tokenizer = config.tokenizer.build()
    config = with_vocabulary(config, tokenizer)
    Model(config, config.model.build().init(jax.random.key(0)), tokenizer).save(root / "dense")
    return root


@pytest.fixture(scope="module")
def trained(folder):
    """Two runs around one backbone, each with an expert of its own: one went on from an upcycled model."""
    keys = ["method.experts=2", "method.top_k=2", "method.rows=domains", "limit=4"]
    texts = f"text=[{folder / 'law.jsonl'},{folder / 'code.jsonl'}]"
    assert cli.main(["upcycle", f"checkpoint={folder / 'dense'}", f"output={folder / 'seed'}", *keys, texts]) == 0
    keys = ["tokenizer=bytes", "data=files", f"data.source.paths={folder / 'law.jsonl'}", "data.holdout_every=4"]
    keys += ["train.steps=3", "train.batch_size=2", "train.sequence_length=32", "train.checkpoint_every=2"]
    keys += ["train.evaluate_every=null", "schedule=constant", "train.frozen_experts=[0]"]
    keys += ["train.only=[ffn.inner.experts,ffn.inner.router]", f"run.dir={folder / 'law'}"]
    train(load_run_config([f"init_from={folder / 'seed'}", *keys]))
    law = elm.load(folder / "law")
    params = jax.tree.map_with_path(_second_expert_moved, law.params)
    Model(law.config, params, law.tokenizer).save(folder / "code")
    return folder


def _second_expert_moved(path, leaf):
    return leaf.at[:, 1].add(0.1) if any(step.key == "experts" for step in path) else leaf


def logits(path):
    return np.asarray(elm.load(path).logits(np.arange(60).reshape(2, 30)))


@pytest.mark.slow
def test_upcycled_models_compute_what_they_did(folder, run):
    status, out, err = run(
        "upcycle", f"checkpoint={folder / 'dense'}", f"output={folder / 'copies'}", "method.experts=4"
    )
    assert (status, err) == (0, "") and "2 of 2 layers have experts, 4 each" in out
    want = logits(folder / "dense")
    np.testing.assert_allclose(logits(folder / "copies"), want, atol=1e-5 * np.abs(want).max())
    config = elm.load(folder / "copies").config
    assert config.run.dir == str(folder / "copies") and config.model.blocks["layer_moe"].ffn.router.normalize
    status, _, err = run(
        "upcycle", f"checkpoint={folder / 'dense'}", f"output={folder / 'parts'}", "method=split",
        "method.experts=4", "method.layers=[1]", "method.shared=0.25", "limit=8", f"text={folder / 'law.jsonl'}",
    )  # fmt: skip
    assert (status, err) == (0, "")
    layers = elm.load(folder / "parts").model.layers
    assert layers[0].ffn.kind == "swiglu" and (layers[1].ffn.expert.hidden, layers[1].ffn.shared.hidden) == (3, 4)


@pytest.mark.slow
def test_experts_merge_and_drop(trained, run):
    merged, alone = trained / "merged", trained / "alone"
    status, out, err = run("merge", f"checkpoints=[{trained / 'law'},{trained / 'code'}]", f"output={merged}")
    assert (status, err) == (0, "") and "2 of 2 layers have experts, 3 each" in out
    status, _, err = run("extract", f"checkpoint={merged}", f"output={alone}", "experts=[0,2]")
    assert (status, err) == (0, "")
    want = logits(trained / "code")
    np.testing.assert_allclose(logits(alone), want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want - logits(trained / "law")).max() > 1e-3
    status, _, err = run("extract", f"checkpoint={merged}", f"output={trained / 'two'}", "experts=2", "limit=2")
    assert (status, err) == (0, "")
    assert [layer.ffn.experts for layer in elm.load(trained / "two").model.layers] == [2, 2]


@pytest.mark.slow
def test_routing_is_one_command(trained, run, tmp_path):
    output = tmp_path / "routing.json"
    keys = ["routing=true", "limit=8", f"text=[{trained / 'law.jsonl'},{trained / 'code.jsonl'}]", f"output={output}"]
    status, out, err = run("evaluate", f"checkpoint={trained / 'law'}", *keys)
    assert (status, err) == (0, "")
    found = json.loads(output.read_text())["routing"]
    assert found["rows"] == 16 and len(found["layers"]) == 2 and "token table" in out and "same since" in out
    for layer in found["layers"]:
        assert (layer["experts"], layer["top_k"]) == (2, 2) and sum(layer["load"]) == pytest.approx(1)
        assert layer["table_accuracy"] >= layer["table_chance"] - 0.1 and 0 <= layer["domain_distance"] <= 1
        assert [row["step"] for row in layer["stability"]] == [2] and layer["stability"][0]["agreement"] > 0.5
    assert found["super_experts"][0]["peak"] == max(peak for layer in found["layers"] for peak in layer["peaks"])
    status, out, err = run("evaluate", f"checkpoint={trained / 'dense'}", "routing=true", "limit=1")
    assert (status, err) == (0, "") and "no layer has experts" in out


FAULTS = [
    (["upcycle", "checkpoint={root}/missing", "output={root}/new"], 4, "neither a run directory"),
    (["upcycle", "checkpoint={root}/dense", "output={root}/seed"], 4, "already holds something"),
    (["upcycle", "checkpoint={root}/seed", "output={root}/new"], 2, "checkpoint: no layer has a dense ffn"),
    (["upcycle", "checkpoint={root}/dense", "output={root}/new", "method=splt"], 2, "did you mean 'split'"),
    (["upcycle", "checkpoint={root}/dense", "output={root}/new", "method.top_k=9"], 2, "method.top_k: 9 of 8 experts"),
    (
        ["upcycle", "checkpoint={root}/dense", "output={root}/new", "method=split", "method.by=domains"],
        2,
        "text: 0 files",
    ),
    (["merge", "checkpoints=[{root}/law]", "output={root}/new"], 2, "checkpoints: expected at least 2 items"),
    (["merge", "checkpoints=[{root}/law,{root}/law]", "output={root}/new"], 2, "is named twice"),
    (["merge", "checkpoints=[{root}/dense,{root}/missing]", "output={root}/new"], 4, "neither a run directory"),
    (["extract", "checkpoint={root}/dense", "output={root}/new", "experts=1"], 2, "checkpoint: no layer has experts"),
    (["extract", "checkpoint={root}/law", "output={root}/new", "experts=[0,5]"], 2, "experts: there is no expert 5"),
    (["extract", "checkpoint={root}/law", "output={root}/new", "experts=1"], 2, "a token takes 2; keep at least 2"),
    (
        ["extract", "checkpoint={root}/law", "output={root}/new", "experts=[0]", "uneven=true"],
        2,
        "uneven: experts are named",
    ),
    (["extract", "checkpoint={root}/law", "output={root}/new"], 2, "extract: say what stays"),
]


@pytest.mark.parametrize(("keys", "status", "said"), FAULTS, ids=[fault[2] for fault in FAULTS])
def test_faults_leave_nothing(trained, run, keys, status, said):
    found, _, err = run(*(key.format(root=trained) for key in keys))
    assert found == status and err.startswith("error: ") and said in err and "Traceback" not in err
    assert not (trained / "new").exists()
