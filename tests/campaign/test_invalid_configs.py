"""Random faults in configs: each ends in exit status 2 and a line that names a key there is; nothing is started."""

import random
import re
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from efficient_lm.cli import main as cli
from efficient_lm.composition import ConfigRoots
from efficient_lm.config import EvaluateConfig, GenerateConfig, RunConfig, load_run_config
from efficient_lm.spec import Choice, Spec

CAMPAIGN, PIECES = 500, 10
"""Faults of the whole campaign, and the tests it is cut into; two thirds of a second for each on one core."""
FAST = 12

LETTERS = "abcdefghijklmnopqrstuvwxyz_"
MODELS = ["uniform", "mamba2_tiny", "griffin_tiny", "moe_tiny", "mod_tiny", "samba_tiny", "masformer_tiny"]
MIXERS = ["attention", "mamba2", "gla", "rg_lru", "native_sparse", "multi_latent", "gated_delta_net"]
GROUPS = ["mixer", "ffn", "depth", "model", "objective", "data", "tokenizer", "optimizer", "schedule", "nesting",
          "precision", "parallelism", "tracker", "experiment"]  # fmt: skip
CONTRADICTIONS = [
    ["train.batch_size=6", "train.accumulate=4"], ["train.stop_at_accuracy=0.5"], ["mixer=attention", "mixer.heads=3"],
    ["data=parity", "train.stop_at_accuracy=0.5", "train.evaluate_every=null"], ["mixer=hydra"],
    ["mixer=attention", "mixer.heads=4", "mixer.kv_heads=3"], ["data=parity", "train.sequence_length=32"],
    ["model.layout=[layer,other]"], ["model.layout=[]"], ["model.vocab_size=100"], ["nesting=joint",
    "model.elastic.ffn=[0.5,0.25]"], ["nesting=sample", "nesting.probabilities=[1,1,1]", "model.elastic.ffn=[0.5,1]"],
    ["mixer=attention", "mixer.heads=[1,2,4]"], ["parallelism=expert"], ["parallelism.mesh={data: 3}"],
    ["parallelism.mesh={data: -1, fsdp: -1}"], ["parallelism.rules={mlp: tensor}"], ["model.learned_positions=8"],
    ["model.exits={every: 9}"], ["model.pregate={experts: 4}"], ["model.blocks.layer.shared_norm=true"],
    ["model.layer_embedding={size: 8}"], ["ffn=moe", "ffn.top_k=9"], ["ffn=moe", "ffn.experts=4", "ffn.top_k=5"],
    ["model.blocks.layer.mixer=null", "model.blocks.layer.ffn=null"], ["train.only=['(']"], ["train.freeze=['.']"],
    ["train.kernels=pallas"], ["mixer=attention", "mixer.implementation=pallas"], ["tokenizer=none"],
    ["data=parity", "tokenizer=bytes", "model.vocab_size=1"], ["train.frozen_experts=[0]"], ["run.name=../x"],
    ["run.name=a/b"], ["schedule.warmup=500"], ["model.repeats=1000000000"], ["model.remat=everything"],
    ["data.source.paths=['https://me:secret@host/a.txt']"],
]  # fmt: skip
"""What is valid by itself and not together."""
MALFORMED = ["train.steps", "=3", "train.steps==", "model.layout=[a", "train.steps={", "train..steps=3", "model.=3",
             "train.steps=1,2", "mixer=attention,gla", "~train.stepz", "~nothing", "+train.steps=3", "+mixer.heads=2",
             "train.steps='", "optimizer.learning_rate=1e", "model.blocks={", "++", "~", "+", "[]=1", "a b=1", "-x",
             "--cfgs", "--cfg=all", "train.steps=${train.stepz}", "train.steps=${oc.env:NOT_THERE}",
             "train.steps=${nothing:1}", "run.seed=${run.seed}", "train.batch_size=???", "{}",
             "model.layout.5=layer"]  # fmt: skip
READERS = {"evaluate": EvaluateConfig, "generate": GenerateConfig}


def spelled_wrong(draw: random.Random, name: str) -> str:
    """A name with one letter lost, doubled, changed, or swapped with the next."""
    place = draw.randrange(len(name))
    return draw.choice([
        name[:place] + name[place + 1 :], name[:place] + name[place] + name[place:],
        name[:place] + draw.choice(LETTERS) + name[place + 1 :],
        name[:place] + name[place : place + 2][::-1] + name[place + 2 :],
    ])  # fmt: skip


def wrong_value(draw: random.Random, place: Any) -> str | None:
    """A value that the type of a key excludes; None where any text would do."""
    kinds = {_bare(member) for member in place.members}
    candidates = ["{wrong: 1}", "[[{}]]"]
    if not any(kind is str or get_origin(kind) is Literal for kind in kinds):
        candidates += ["some_text", "'1'"]
    if any(get_origin(kind) is Literal for kind in kinds) and str not in kinds:
        candidates.append("some_text")
    if kinds <= {int, float}:
        candidates += ["null", "true", "[1]", "nan", "-1000", "inf"]
    if kinds == {int}:
        candidates += ["0.5", "-1"]
    if kinds == {bool}:
        candidates += ["1", "null", "yes_please"]
    if any(get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, Spec)) for kind in kinds):
        candidates = ["some_text", "[1]"]
    return draw.choice(candidates)


def _bare(member: Any) -> Any:
    return _bare(get_args(member)[0]) if get_origin(member) is Annotated else member


def faulty(draw: random.Random, places: Any) -> tuple[list[str], set[str]]:
    """Arguments of the command line with a fault, and the keys of which the message must name one; empty: any."""
    base = [f"model={draw.choice(MODELS)}"] if draw.random() < 0.4 else [f"mixer={draw.choice(MIXERS)}"]
    kind = draw.choice(["key", "key", "key", "value", "value", "value", "choice", "kind", "together", "unread",
                        "malformed", "verb"])  # fmt: skip
    if kind == "together":
        return ["train", *draw.choice(CONTRADICTIONS)], set()
    if kind == "malformed":
        return ["train", *base, draw.choice(MALFORMED)], set()
    if kind == "verb":
        return _of_another_verb(draw)
    if kind == "unread":
        model = draw.choice([name for name in MODELS if name != "uniform"])
        return ["train", f"model={model}", draw.choice(["mixer=gla", "mixer.heads=2", "ffn=geglu", "ffn.hidden=8"])], {
            "mixer", "ffn"}  # fmt: skip
    if kind == "choice":
        group = draw.choice(GROUPS)
        wrong = spelled_wrong(draw, draw.choice(ConfigRoots().choices(group)))
        if wrong in ConfigRoots().choices(group) or not wrong:
            wrong = "no_such_choice"
        return ["train", f"{group}={wrong}"], {group}
    config = load_run_config(base)
    if kind == "kind":
        path, part = draw.choice(list(_chosen(config)))
        wrong = spelled_wrong(draw, part.kind) or "x"
        return ["train", *base, f"{path}.kind={wrong if wrong not in part.kinds else 'no_such_kind'}"], {"kind"}
    place = draw.choice([place for place in places(config) if not isinstance(place.value, dict)])
    if kind == "value":
        return ["train", *base, f"{place.key}={wrong_value(draw, place)}"], {place.key.split(".")[-1]}
    above, _, name = place.key.rpartition(".")
    wrong = spelled_wrong(draw, name)
    while wrong in type(place.owner).keys() or not wrong.strip("_") or wrong in GROUPS:
        wrong = spelled_wrong(draw, name) + "x"
    return ["train", *base, f"{above}{'.' if above else ''}{wrong}=1"], {wrong, name, *type(place.owner).keys()}


def _of_another_verb(draw: random.Random) -> tuple[list[str], set[str]]:
    verb, config = draw.choice(list(READERS.items()))
    key = draw.choice([name for name in config.keys() if name not in ("skipping", "data")])
    if draw.random() < 0.3:
        return [spelled_wrong(draw, verb) + "x", "checkpoint=nowhere"], set(READERS)
    if draw.random() < 0.5:
        wrong = spelled_wrong(draw, key) + "x"
        return [verb, "checkpoint=nowhere", f"{wrong}=1"], {wrong}
    return [verb, "checkpoint=nowhere", f"{key}={{wrong: [1]}}"], {key}


def _chosen(spec: Spec, prefix: str = "") -> Any:
    """Every part of a config that is chosen by its kind."""
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        for key, part in value.items() if isinstance(value, dict) else [("", value)]:
            path = ".".join(filter(None, [prefix, name, key]))
            if isinstance(part, Choice):
                yield path, part
            if isinstance(part, Spec):
                yield from _chosen(part, path)


def every_key() -> set[str]:
    """Every name that is a key somewhere in a config, a group, or an option."""
    found = {*GROUPS, "cfg", "help", *(key for config in (RunConfig, *READERS.values()) for key in config.keys())}
    seen: set[type] = set()
    waiting: list[type] = [Spec]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            if kind not in seen:
                seen.add(kind)
                waiting.append(kind)
                found |= set(kind.keys())
    return found


def wrong_with(arguments: list[str], keys: set[str], capsys: Any, folder: Any) -> str | None:
    """What is not as it should be with the answer to faulty arguments; None if all is."""
    short = ["train.steps=1"] if "train.steps" not in str(arguments) else []
    verb, *given = arguments
    status = cli.main([verb, f"run.dir={folder}", *short, *given] if verb == "train" else arguments)
    said = capsys.readouterr()
    lines, words = said.err.strip().splitlines(), set(re.findall(r"[A-Za-z_][A-Za-z_0-9]*", said.err))
    if status != 2 or "Traceback" in said.err + said.out:
        return f"exit status {status}: {said.err[-400:]}"
    if not 1 <= len(lines) <= 4 or not lines[0].startswith("error: "):
        return f"not one to four lines: {said.err[:400]}"
    if not words & (keys or every_key()):
        return f"names none of {sorted(keys)[:5]}: {said.err[:400]}"
    return "something was started" if folder.exists() else None


def campaign(numbers: range, places: Any, capsys: Any, folder: Any) -> list[str]:
    """What was wrong with the answers to the faults of these numbers."""
    found = []
    for number in numbers:
        arguments, keys = faulty(random.Random(number), places)
        fault = wrong_with(arguments, keys, capsys, folder)
        found += [f"{number}: {arguments}: {fault}"] if fault else []
    return found


@pytest.fixture(autouse=True)
def own_process_settings(monkeypatch, tmp_path):
    """What the command line sets for its process is none of the other tests' business."""
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(cli, "configure_logging", lambda: None)
    monkeypatch.chdir(tmp_path)


def test_random_faults_are_named(places, capsys, tmp_path):
    faults = campaign(range(FAST), places, capsys, tmp_path / "run")
    assert faults == [], "\n".join(faults)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
def test_the_whole_campaign_of_faults(piece, places, capsys, tmp_path):
    size = CAMPAIGN // PIECES
    faults = campaign(range(piece * size, (piece + 1) * size), places, capsys, tmp_path / "run")
    assert faults == [], "\n".join(faults)
    assert list(tmp_path.iterdir()) == []
