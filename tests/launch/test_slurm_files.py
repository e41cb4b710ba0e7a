"""Batch scripts for SLURM: what they ask for, and what they do with signals and exit statuses."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = ("slurm_train.sbatch", "slurm_sweep.sbatch", "cloud_tpu.sh")
OPTIONS = {
    "job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "signal",
    "requeue", "open-mode", "output",
}  # fmt: skip
"""Options of sbatch."""

# Ends with 143 when `scancel` has asked it to, as train does.
SRUN = """
trap 'exit 143' TERM
echo $$ > srun.pid
while [ ! -e end ]; do sleep 0.02; done
exit $(cat end)
"""
SCANCEL = "kill -TERM $(cat srun.pid)"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound(launch_files, name):
    subprocess.run(["bash", "-n", launch_files / name], check=True)
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    if shellcheck is not None:
        done = subprocess.run([shellcheck, launch_files / name], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.endswith(".sbatch")])
def test_options_are_those_of_sbatch_and_come_before_any_command(launch_files, name):
    text = (launch_files / name).read_text()
    given = re.findall(r"^#SBATCH --([a-z-]+)(?:=\S+)?$", text, re.MULTILINE)
    assert set(given) <= OPTIONS and len(given) == text.count("#SBATCH") > 5
    first = next(index for index, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert "#SBATCH" not in "\n".join(text.splitlines()[first:])


@pytest.fixture
def training(commands, launched, tmp_path, until):
    """``training(*keys)``: the script for training, whose processes have started."""

    def start(*keys):
        commands(srun=SRUN, scancel=SCANCEL, scontrol="true")
        found = launched("slurm_train.sbatch", *keys, SLURM_JOB_ID="12")
        until(lambda: (tmp_path / "srun.pid").exists() and (tmp_path / "srun.pid").read_text())
        return found

    return start


@pytest.mark.parametrize("status", [0, 2, 6, 143])
def test_a_run_that_ends_by_itself_is_not_queued_again(training, calls, tmp_path, status):
    job = training("experiment=one", "data.source.paths=[a b]")
    (tmp_path / "end").write_text(str(status))
    assert job.wait(timeout=30) == status
    assert calls() == ["srun --kill-on-bad-exit=0 efficient-lm train experiment=one data.source.paths=[a b]"]


def test_near_the_time_limit_it_is_saved_and_queued_again(training, calls):
    job = training("experiment=one")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 143
    assert calls()[1:] == ["scancel --signal=TERM 12", "scontrol requeue 12"]


def test_a_run_that_fails_near_the_time_limit_is_not(training, calls, commands, tmp_path):
    commands(scancel=f"echo 5 > {tmp_path / 'end'}")
    job = training("experiment=one")
    commands(scancel=f"echo 5 > {tmp_path / 'end'}")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 5
    assert calls()[1:] == ["scancel --signal=TERM 12"]


# Waits as a sweep does, and says so once it hears signals.
SWEEP = """
trap 'sleep 0.1; exit 143' TERM
env | grep ^SLURM_ > seen
while true; do sleep 0.02; done
"""


@pytest.fixture
def watching(commands, launched, tmp_path, until):
    """The script for sweeps, with a sweep that has started."""
    commands(efficient_lm=SWEEP, scontrol="true")
    found = launched("slurm_sweep.sbatch", "mixer=a,b", SLURM_JOB_ID="12", SLURM_MEM_PER_NODE="1", SLURM_CONF="/etc/x")
    until(lambda: (tmp_path / "seen").exists() and (tmp_path / "seen").read_text())
    return found


def test_a_sweep_that_is_cancelled_stops_its_runs_and_stays_ended(watching, calls, tmp_path):
    watching.terminate()
    assert watching.wait(timeout=30) == 143
    assert calls() == ["efficient-lm sweep launcher=slurm mixer=a,b"]
    assert (tmp_path / "seen").read_text() == "SLURM_CONF=/etc/x\n"


def test_a_sweep_near_its_time_limit_leaves_its_runs_alone_and_comes_back(watching, calls):
    began = time.monotonic()
    watching.send_signal(signal.SIGUSR1)
    assert watching.wait(timeout=30) == 137
    assert calls()[1:] == ["scontrol requeue 12"] and time.monotonic() - began < 20
