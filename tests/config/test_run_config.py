"""The config of a run as one spec; every YAML file against it; the JSON Schema."""

import re

import pytest

from efficient_lm.composition import ConfigRoots, compose
from efficient_lm.config import (
    EvaluateConfig,
    GenerateConfig,
    RunConfig,
    json_schema,
    load_run_config,
    read_config,
    save_config,
)
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.models.mixers.base import MixerSpec
from efficient_lm.validation import validate

USERS_OWN = {"data=files": ["data.source.paths=[text.txt]"], "tokenizer=file": ["tokenizer.path=tokenizer.json"]}
"""What must be given besides a choice."""

ROOTS = ConfigRoots()
CHOICES = [f"{group}={name}" for group in ROOTS.defaults("train") for name in ROOTS.choices(group)]
BIDIRECTIONAL = {f"mixer={kind}" for kind, found in MixerSpec.kinds.items() if found.bidirectional}


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice not in BIDIRECTIONAL])
def test_every_choice_of_every_group_is_valid(choice):
    given = [value for values in USERS_OWN.values() for value in values] if choice.startswith("experiment=") else []
    if choice.startswith("experiment="):
        chosen = compose("train", [choice, *given]).choices
        given = [value for group, name in chosen.items() for value in USERS_OWN.get(f"{group}={name}", [])]
    config = load_run_config([choice, *USERS_OWN.get(choice, []), *given])
    assert validate(RunConfig, config.dump()) == config


@pytest.mark.parametrize("choice", sorted(BIDIRECTIONAL))
def test_a_bidirectional_mixer_is_refused_under_a_causal_objective(choice):
    kind = choice.partition("=")[2]
    message = (
        rf"model.blocks.layer.mixer: '{kind}' is bidirectional, .* objective 'causal_lm' predicts; valid: attention"
    )
    with pytest.raises(ConfigError, match=message):
        load_run_config([choice])


def test_a_printed_config_gives_the_same_run():
    composed = compose("train", ["model.width=64", "mixer.heads=[1,2,4,8]", "ffn=geglu"])
    assert validate(RunConfig, composed.values) == load_run_config(
        ["model.width=64", "mixer.heads=[1,2,4,8]", "ffn=geglu"]
    )


def test_written_and_read_back(tmp_path):
    config = load_run_config(["optimizer.learning_rate=3e-5", "mixer.window=[null,8,null,8]", "run.name='1e3'"])
    save_config(tmp_path / "config.yaml", config)
    assert read_config(tmp_path / "config.yaml") == config
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_config_file_that_cannot_be_used(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(CheckpointError, match="config.yaml: cannot be read"):
        read_config(path)
    path.write_text("train: {steps: 1, speed: 2}\nmodel: [\n")
    with pytest.raises(CheckpointError, match="config.yaml:3: not valid YAML"):
        read_config(path)
    save_config(path, load_run_config())
    path.write_text(path.read_text().replace("steps:", "stepz:"))
    with pytest.raises(CheckpointError, match=r"config.yaml: train.stepz: unknown key; did you mean 'steps'"):
        read_config(path)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["mixer.haeds=3"], "model.blocks.layer.mixer.haeds: unknown key; did you mean 'heads'"),
        (["optimzer=adamw"], "optimzer: unknown key; did you mean 'optimizer'"),
        (["train.batch=2"], "train.batch: unknown key; did you mean 'batch_size'"),
        (["optimizer.kind=adam"], "optimizer.kind: unknown optimizer kind 'adam'; did you mean 'adamw'"),
        (["model.width=wide"], "model.width: expected a whole number; got the text 'wide'"),
        (["train.accumulate=3"], "3 micro-batches do not divide train.batch_size=32; nearest that do: 1, 2, 4"),
        (["schedule.warmup=2000"], "schedule.warmup: 2000 steps, but the run has 1000; at most 1000"),
        (["schedule.warmup=1.5"], "schedule.warmup: expected a whole number of steps, or a fraction of the run"),
        (["schedule=warmup_stable_decay", "schedule.decay=990"], "schedule.decay: 990 steps after 50 of warmup"),
        (["run.name=''"], "run.name: expected some text; got none"),
        (["mixer.heads=3"], "3 heads do not divide width 256"),
        (["model.layout=[layr]"], "no block is named 'layr'; did you mean 'layer'"),
    ],
)  # fmt: skip
def test_faults(overrides, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_run_config(overrides)


def test_the_other_verbs():
    generate = validate(GenerateConfig, compose("generate", ["checkpoint=runs/a", "prompt=[a,b]", "top_p=0.9"]).values)
    assert generate.prompt == ("a", "b") and generate.top_p == 0.9
    evaluate = validate(EvaluateConfig, compose("evaluate", ["checkpoint=runs/a", "text=[a.txt,b.txt]"]).values)
    assert evaluate.text == ("a.txt", "b.txt") and evaluate.data is None
    evaluate = validate(EvaluateConfig, compose("evaluate", ["checkpoint=runs/a", "data=sotu"]).values)
    assert evaluate.data.source.kind == "sotu"
    with pytest.raises(ConfigError, match="checkpoint: a value is needed"):
        compose("generate")
    with pytest.raises(ConfigError, match="text: data is given too"):
        validate(EvaluateConfig, compose("evaluate", ["checkpoint=a", "data=sotu", "text=b"]).values)
    with pytest.raises(ConfigError, match="prompt_file: prompt is given too"):
        validate(GenerateConfig, compose("generate", ["checkpoint=a", "prompt_file=b", "prompt=c"]).values)


def test_the_schema_knows_every_section_and_kind():
    schema = json_schema()
    assert set(schema["properties"]) == {"defaults", "mixer", "ffn", "depth", *RunConfig.model_fields}
    references = set(re.findall(r"#/\$defs/([^'\"]+)", str(schema)))
    assert references <= set(schema["$defs"])
    kinds = schema["properties"]["ffn"]["anyOf"][0]["oneOf"]
    names = {kind["$ref"].split("/")[-1] for kind in kinds if "$ref" in kind}
    found = {schema["$defs"][name]["properties"]["kind"]["const"] for name in names}
    assert found >= {"swiglu", "geglu", "reglu", "mlp"}
    assert schema["$defs"]["TrainSpec"]["additionalProperties"] is False
