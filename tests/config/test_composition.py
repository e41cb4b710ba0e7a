"""Hydra composition, overrides of every form, and what is said when they are wrong."""

from pathlib import Path

import pytest
import yaml

from efficient_lm.composition import ConfigRoots, builtin_configs, compose, read_yaml, to_yaml
from efficient_lm.config import PlanConfig
from efficient_lm.errors import ConfigError


def train(*overrides, config_dirs=()):
    return compose("train", overrides, config_dirs).values


def fault(*overrides, config_dirs=()):
    with pytest.raises(ConfigError) as caught:
        compose("train", overrides, config_dirs)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_palettes_go_into_the_model_and_out_of_the_config():
    values = train("ffn=mlp", "mixer.heads=4")
    layer = values["model"]["blocks"]["layer"]
    assert (layer["ffn"]["kind"], layer["mixer"]["heads"]) == ("mlp", 4)
    assert not {"mixer", "ffn", "depth", "hydra"} & values.keys()
    assert layer["depth"] == {"kind": "none"}
    depth = train("depth=mixture_of_depths", "depth.capacity=0.5")["model"]["blocks"]["layer"]["depth"]
    assert (depth["kind"], depth["capacity"], depth["every"]) == ("mixture_of_depths", 0.5, 2)


def test_values_of_any_depth_may_be_set_whether_listed_or_not():
    values = train(
        "train.steps=7", "model.blocks.layer.norm.kind=layernorm", "+model.logit_softcap=30.0", "++run.seed=3"
    )
    assert values["train"]["steps"] == 7 and values["run"]["seed"] == 3
    assert values["model"]["blocks"]["layer"]["norm"] == {"kind": "layernorm"}
    assert values["model"]["logit_softcap"] == 30.0


def test_a_value_below_an_interpolation_changes_that_place_alone():
    values = train("model.blocks.layer.mixer.window=16", "mixer.heads=4")
    assert (
        values["model"]["blocks"]["layer"]["mixer"] | {"heads": 4, "window": 16}
        == values["model"]["blocks"]["layer"]["mixer"]
    )


def test_a_mapping_merges_unless_it_names_its_kind():
    layer = train("model.blocks.layer.mixer={heads: 2}")["model"]["blocks"]["layer"]
    assert layer["mixer"]["kind"] == "attention" and layer["mixer"]["heads"] == 2
    layer = train("model.blocks.layer.mixer={kind: other, size: 2}")["model"]["blocks"]["layer"]
    assert layer["mixer"] == {"kind": "other", "size": 2}


def test_keys_can_be_deleted_and_items_of_lists_set():
    assert "clip_norm" not in train("~train.clip_norm")["train"]
    assert train("model.layout=[a,b]", "model.layout.1=c")["model"]["layout"] == ["a", "c"]
    assert train("~model.blocks.layer.mixer.window")["model"]["blocks"]["layer"]["mixer"].keys() >= {"kind", "heads"}


def test_numbers_in_exponent_form_are_numbers():
    values = train("optimizer.learning_rate=1e-3", "train.steps=2e3")
    assert values["optimizer"]["learning_rate"] == 1e-3 and values["train"]["steps"] == 2000.0
    assert values["optimizer"]["epsilon"] == 1e-8


def test_prose_needs_no_quoting():
    text = "It's, well: [ok] ${HOME} = \\"
    assert compose("generate", ["checkpoint=a", f"prompt={text}"]).values["prompt"] == text
    assert compose("generate", ["checkpoint=a", "prompt=['a, b',c]"]).values["prompt"] == ["a, b", "c"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["mixer=atention"], "mixer=atention: no such config; did you mean 'attention'?"),
        (["experiment=nothing"], "experiment=nothing: no such config"),
        (["optimizer=3"], "optimizer: takes the name of a config, single values are set as optimizer.key=value"),
        (["train.steps=["], "train.steps=[: not a valid override"),
        (["train.steps"], "train.steps: not an override: write key=value"),
        (["train.steps=1,2"], "train.steps=1,2: several values for one run; a list is written train.steps=[a,b]"),
        (["mixer=attention,attention"], "several values for one run"),
        (["data=files"], "data.source.paths: a value is needed: give data.source.paths=..."),
        (["run.dir=${runn.name}"], "run.dir: ${runn.name} names no key; did you mean 'run'?"),
        (["model.blocks.layer=${nothing}", "model.blocks.layer.ffn.bias=true"], "model.blocks.layer.ffn.bias: "),
        (["run.dir=${run.nam}"], "run.dir: ${run.nam} names no key; did you mean 'name'?"),
        (["+run.seed=1"], "+run.seed: there is one already; write run.seed=..."),
        (["~train.step"], "~train.step: there is no such key to delete; did you mean 'steps'?"),
        (["model.layout.3=a"], "model.layout.3: a list of 1 has no item '3'"),
        (["model.layout.first=a"], "model.layout.first: a list of 1 has no item 'first'"),
        (["model.layout.7.x=a"], "model.layout.7: a list of 1 has no item '7'"),
    ],
)
def test_faults_name_the_place_and_what_is_valid(overrides, said):
    assert said in fault(*overrides)
    assert "\n" not in fault(*overrides)


OWN_MODEL = """
width: 64
blocks: {a: {mixer: {kind: attention, heads: 4}, ffn: "${ffn}"}}
layout: [a]
"""


def test_a_palette_that_nothing_reads_is_an_error(tmp_path):
    write(tmp_path / "model/own.yaml", OWN_MODEL)
    assert train("model=own", "ffn=mlp", config_dirs=[tmp_path])["model"]["blocks"]["a"]["ffn"]["kind"] == "mlp"
    for override in ("mixer=attention", "mixer.heads=4", "depth=mixture_of_depths"):
        said = fault("model=own", override, config_dirs=[tmp_path])
        palette = override.partition("=")[0].partition(".")[0]
        assert said.startswith(f"{override}: nothing reads it: model=own names the {palette} of its blocks itself")
        assert "blocks: a" in said
    assert "nothing reads it" in fault("mixer=attention", "model.blocks.layer.mixer={kind: other}")


def test_so_is_one_that_an_experiment_sets(tmp_path):
    write(tmp_path / "model/own.yaml", OWN_MODEL)
    write(tmp_path / "mixer/thin.yaml", "kind: attention\nheads: 1\n")
    recipe = "# @package _global_\ndefaults: [{override /model: own}]\n"
    write(tmp_path / "experiment/plain.yaml", recipe)
    write(tmp_path / "experiment/values.yaml", recipe + "mixer: {heads: 2}\n")
    write(tmp_path / "experiment/choice.yaml", recipe.replace("]", ", {override /mixer: thin}]"))
    assert train("experiment=plain", config_dirs=[tmp_path])["model"]["width"] == 64
    assert fault("experiment=values", config_dirs=[tmp_path]).startswith(
        "mixer (set by experiment=values): nothing reads it"
    )
    assert fault("experiment=choice", config_dirs=[tmp_path]).startswith("mixer=thin: nothing reads it")


def test_an_experiment_may_depart_from_a_palette_at_one_place(tmp_path):
    write(tmp_path / "mixer/thin.yaml", "kind: attention\nheads: 1\n")
    write(
        tmp_path / "experiment/deep.yaml",
        "# @package _global_\ndefaults: [{override /mixer: thin}]\nmodel: {blocks: {layer: {mixer: {window: 8}}}}\n",
    )
    for overrides in ([], ["mixer=thin"]):
        layer = train("experiment=deep", *overrides, config_dirs=[tmp_path])["model"]["blocks"]["layer"]
        assert layer["mixer"] == {"kind": "attention", "heads": 1, "window": 8}
    assert "mixer.heads=2: nothing reads it" in fault("experiment=deep", "mixer.heads=2", config_dirs=[tmp_path])


def test_experiments_override_groups_and_values(tmp_path):
    recipe = """
    # @package _global_
    defaults: [{override /ffn: mlp}, {override /schedule: constant}]
    mixer: {heads: 2}
    train: {steps: 11}
    """
    write(tmp_path / "experiment/mine.yaml", "\n".join(line.strip() for line in recipe.strip().splitlines()))
    values = train("experiment=mine", "train.batch_size=4", config_dirs=[tmp_path])
    layer = values["model"]["blocks"]["layer"]
    assert (layer["ffn"]["kind"], layer["mixer"]["heads"], values["schedule"]["kind"]) == ("mlp", 2, "constant")
    assert (values["train"]["steps"], values["train"]["batch_size"]) == (11, 4)


def test_folders_of_a_user(tmp_path):
    assert "is not a folder" in fault(config_dirs=[tmp_path / "none"])
    write(tmp_path / "experiment/bad.yaml", "# @package _global_\ntrain: {steps: 1\nmodel: 3\n")
    assert "bad.yaml:" in fault("experiment=bad", config_dirs=[tmp_path])
    write(tmp_path / "experiment/unknown.yaml", "# @package _global_\ndefaults: [{override /ffn: mpl}]\n")
    assert "ffn/mpl: no such config; did you mean 'mlp'?" in fault("experiment=unknown", config_dirs=[tmp_path])
    write(tmp_path / "ffn/mlp.yaml", "kind: mlp\n")
    assert "has the name of a built-in config" in fault(config_dirs=[tmp_path])


def test_plan_takes_what_train_takes():
    planned = compose("plan", ["ffn=mlp"]).values
    own = {key: planned.pop(key) for key in PlanConfig.keys()}
    assert own == PlanConfig().dump()
    assert planned == compose("train", ["ffn=mlp"]).values
    assert ConfigRoots().defaults("plan") == ConfigRoots().defaults("train")


def test_a_composed_config_written_and_read_is_the_same(tmp_path):
    composed = compose("train", ["optimizer.learning_rate=1e-5", "run.name='1e-3'"])
    write(tmp_path / "config.yaml", composed.to_yaml())
    assert read_yaml(tmp_path / "config.yaml") == composed.values


def test_yaml_reads_data_and_never_code(tmp_path):
    text = {"float": 1e-3, "text": "1e-3", "interpolation": "${oc.env:HOME}", "none": None}
    assert read_yaml(write(tmp_path / "a.yaml", to_yaml(text))) == text
    with pytest.raises(ConfigError, match="not valid YAML|could not determine a constructor"):
        read_yaml(write(tmp_path / "b.yaml", "x: !!python/object/apply:os.system [echo]"))
    with pytest.raises(ConfigError, match="c.yaml:3"):
        read_yaml(write(tmp_path / "c.yaml", "a: 1\nb: [\n"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="holds no mapping"):
        read_yaml(write(tmp_path / "d.yaml", "[1, 2]"))


def test_every_config_opens_with_a_comment_that_says_what_it_is():
    for file in builtin_configs().rglob("*.yaml"):
        lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# ") and len(lines[0]) > 20, file
        assert yaml.safe_load(file.read_text()), file
