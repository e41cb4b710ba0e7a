"""The command line: help without jax, exit statuses, what is printed where."""

import errno
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from efficient_lm.cli import help as cli_help
from efficient_lm.cli.help import VERBS
from efficient_lm.errors import CheckpointError, ConfigError, DataError, DivergedError, ResourceError

ROOT = Path(__file__).parents[2]
WITH_CONFIG = ("train", "evaluate", "generate", "plan")


def failing(monkeypatch, error):
    """A verb `train` that raises."""

    def verb(overrides, options):
        raise error

    module = types.SimpleNamespace(ROOT="train", SUMMARY="", HELP="", run=verb)
    monkeypatch.setitem(sys.modules, "efficient_lm.cli.train", module)


def test_help_lists_every_verb(run):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "") and all(f"\n  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb, run):
    status, out, err = run(verb, "--help")
    assert (status, err) == (0, "")
    assert f"Usage  efficient-lm {verb} " in out and "--config-dir DIR" in out and "Examples" in out


def test_help_shows_groups_and_choices_of_a_user(run, tmp_path):
    (tmp_path / "mixer").mkdir()
    (tmp_path / "mixer/mine.yaml").write_text("kind: attention\n")
    _, out, _ = run("train", "--help", "--config-dir", str(tmp_path))
    assert re.search(r"mixer= +attention\*, .*mine", out)
    assert re.search(r"tokenizer= +bytes, file, none, sotu_bpe\*", out) and re.search(r"experiment= +\w", out)
    assert re.search(r"data= +compression, files, .*sotu", run("evaluate", "--help")[1])


def test_help_and_printing_a_config_import_no_jax():
    code = (
        "import sys; from efficient_lm.cli.main import main\n"
        f"for verb in {VERBS}: main([verb, '--help'])\n"
        "main(['--help']); main(['train', 'ffn=mlp', '--cfg', 'job'])\n"
        "print('LOADED', sorted({'jax', 'flax', 'grain', 'wandb', 'orbax', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("LOADED []\n"), done.stderr


def test_cfg_prints_the_composed_config(run):
    status, out, err = run("train", "--cfg", "job", "ffn=mlp", "run.name=wide")
    config = yaml.safe_load(out)
    assert (status, err) == (0, "") and "${" not in out
    assert config["model"]["blocks"]["layer"]["ffn"]["kind"] == "mlp" and config["run"]["dir"] == "runs/wide"


def test_options_may_stand_anywhere(run, tmp_path):
    (tmp_path / "ffn").mkdir()
    (tmp_path / "ffn/mine.yaml").write_text("kind: mlp\n")
    status, out, _ = run("train", "ffn=mine", "--config-dir", str(tmp_path), "--cfg=job", "train.steps=3")
    assert status == 0 and yaml.safe_load(out)["train"]["steps"] == 3


SMALL = ["data=parity", "model.width=16", "train.batch_size=2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "trian: no such verb; did you mean 'train'? valid: train, benchmark"),
        (["train.steps=3"], "train.steps=3: the verb comes first: efficient-lm VERB key=value"),
        (["train", "--confg-dir", "x"], "unrecognized arguments: --confg-dir; see --help"),
        (["train", "--cfg", "all"], "--cfg: invalid choice: 'all'"),
        (["train", "--config-dir", "/nonexistent"], "--config-dir: /nonexistent is not a folder"),
        (["train", "mixer=atention"], "mixer=atention: no such config; did you mean 'attention'"),
        (["train", "mixer.haeds=3"], "model.blocks.layer.mixer.haeds: unknown key; did you mean 'heads'"),
        (["train", "train.step=3"], "train.step: unknown key; did you mean 'steps'"),
        (["plan", "train.steps=many"], "train.steps: expected a whole number; got the text 'many'"),
        (["train", "train.kernels=palas"], "train.kernels: 'palas' is not valid; did you mean 'pallas'"),
        (["train", "experiment=quickstart", "train.kernels=pallas"], "train.kernels: no kernel runs on backend cpu"),
        (
            ["train", "experiment=quickstart", "mixer.implementation=pallas"],
            "model.blocks.layer.mixer.implementation: no kernel runs on backend cpu (Pallas kernels run on TPUs and on "
            "NVIDIA Hopper GPUs); valid here: auto, xla",
        ),
        (
            ["train", *SMALL, "mixer=mamba_mixer", "mixer.channel.implementation=pallas"],
            "model.blocks.layer.mixer.channel.implementation: no kernel runs on backend cpu",
        ),
        (
            [
                "train",
                *SMALL,
                "mixer=parallel",
                "mixer.second.mixer={kind: attention, heads: 2, implementation: cudnn}",
            ],
            "model.blocks.layer.mixer.second.mixer.implementation: attention: implementation 'cudnn' cannot honour "
            "backend cpu, dtype float32, segment_ids; can: xla, reference",
        ),
        (["generate"], "checkpoint: a value is needed"),
        (["generate", "checkpoint=a", "temprature=1"], "temprature: unknown key; did you mean 'temperature'"),
        (["evaluate", "checkpoint=a", "batch_size=0"], "batch_size: expected at least 1; got 0"),
        (["schema", "a=1"], "a=1: schema takes no key"),
        (["schema", "--cfg", "job"], "schema: has no config to print"),
    ],
)
def test_config_faults(arguments, said, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (ConfigError.status, "") and status == 2
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x: y"), 2),
        (DataError("x: y"), 3),
        (CheckpointError("x: y"), 4),
        (DivergedError("x: y"), 5),
        (ResourceError("x: y"), 6),
    ],
)
def test_exit_statuses(error, status, run, monkeypatch):
    failing(monkeypatch, error)
    assert run("train") == (status, "", "error: x: y\n")
    _, _, err = run("train", "--traceback")
    assert "Traceback" in err and err.endswith("error: x: y\n")


def test_full_disks_and_full_memory_are_resources(run, monkeypatch):
    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"))
    status, _, err = run("train")
    assert status == 6 and err.startswith("error: the disk is full (runs/a/metrics.jsonl)") and err.count("\n") == 1
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    failing(monkeypatch, wrapped)
    assert run("train")[0] == 6
    failing(monkeypatch, RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"))
    status, _, err = run("train")
    assert status == 6 and "train.batch_size" in err


def test_interruptions_and_faults_of_ours(run, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    assert run("train") == (130, "", "interrupted\n")
    failing(monkeypatch, KeyError("inner"))
    status, _, err = run("train")
    assert status == 1 and "Traceback" in err and "KeyError: 'inner'" in err


def test_a_verb_may_name_its_status(run, monkeypatch):
    module = types.SimpleNamespace(ROOT="train", SUMMARY="", HELP="", run=lambda overrides, options: 130)
    monkeypatch.setitem(sys.modules, "efficient_lm.cli.train", module)
    assert run("train")[0] == 130


def test_a_reader_that_stops_is_no_fault():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "efficient_lm", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", VERBS)
def test_scripts_are_the_verbs(verb):
    script = ROOT / "scripts" / f"{verb}.py"
    assert len(script.read_text().splitlines()) < 15
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(__import__(f"efficient_lm.cli.{verb}", fromlist=["SUMMARY"]).SUMMARY)


def test_every_file_of_the_folder_is_a_verb():
    files = {file.stem for file in Path(cli_help.__file__).parent.glob("*.py")}
    assert files == {"__init__", "main", "help", *VERBS}
