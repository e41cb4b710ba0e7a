"""The launcher for SLURM, with commands that stand in for SLURM's, and with submitit's jobs of this machine."""

import os
import re
import stat
import sys

import psutil
import pytest

from efficient_lm.errors import ConfigError, ResourceError
from efficient_lm.sweeps.config import read_sweep
from efficient_lm.sweeps.launchers import remote, slurm
from efficient_lm.sweeps.launchers.base import UNKNOWN, Job
from efficient_lm.sweeps.launchers.local import LocalLauncher
from efficient_lm.sweeps.launchers.slurm import SlurmLauncherSpec, folder_of, status_of
from efficient_lm.sweeps.running import attached

COMMANDS = {
    "sbatch": 'grep -q reject "$1" && { echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }; '
    'n=$(cat next); echo $((n + 1)) > next; cp "$1" "script.$n"; echo "$n PENDING" >> queue; '
    'echo "Submitted batch job $n"',
    "srun": "exit 9",
    "squeue": 'echo "$*" >> asked; [ -e down ] && exit 1; cat queue',
    "sacct": '[ -e accounts ] || exit 1; cat accounts',
    "scancel": 'echo "$*" >> cancelled',
}  # fmt: skip


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of commands that stand in for SLURM's, and of what they know."""
    pytest.importorskip("submitit")
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, line in COMMANDS.items():
        (folder / name).write_text(f'#!/bin/sh\ncd "{folder}"\n{line}\n')
        (folder / name).chmod(stat.S_IRWXU)
    (folder / "next").write_text("7")
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    for module, name in ((slurm, "ASK_EVERY"), (slurm, "HURRY"), (remote, "LOOK_EVERY")):
        monkeypatch.setattr(module, name, 0.0)
    return folder


@pytest.fixture
def job(tmp_path):
    """``job(name, code)``: Python code as a run."""

    def make(name="one", code=""):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        return Job(name, [sys.executable, "-S", "-c", code], directory, {}, None, directory / "output.log")

    return make


def says(cluster, *lines):
    (cluster / "queue").write_text("".join(f"{line}\n" for line in lines))


def test_a_run_is_submitted_as_it_was_asked_for(cluster, job):
    spec = SlurmLauncherSpec(
        partition="gpu", account="us", minutes=90, nodes=2, tasks=4, gpus=4, cpus=6, memory=64 * 2**30,
        setup=("module load cuda",), options={"constraint": "h100", "exclusive": True, "hold": False},
    )  # fmt: skip
    handle = spec.build().submit(job())
    assert handle.reference == "slurm 7" and handle.poll() is None
    script = (cluster / "script.7").read_text()
    given = set(re.findall(r"^#SBATCH --(\S+)", script, re.MULTILINE))
    assert given >= {
        "job-name=one", "partition=gpu", "account=us", "time=90", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4",
        "cpus-per-task=6", "mem=64GB", "constraint=h100", "exclusive", "requeue", "signal=USR2@120", "open-mode=append",
    }  # fmt: skip
    assert not any(option.startswith("hold") for option in given)
    assert re.search(
        r"^module load cuda\n(.*\n)*srun .*--kill-on-bad-exit=0 .*submitit\.core\._submit", script, re.MULTILINE
    )


@pytest.mark.parametrize(
    "state, status",
    [("RUNNING", None), ("PENDING", None), ("REQUEUED", None), ("COMPLETING", None), ("TIMEOUT", 143),
     ("PREEMPTED", 143), ("NODE_FAIL", 143), ("CANCELLED", 143), ("OUT_OF_MEMORY", 6), ("FAILED", 1),
     ("COMPLETED", UNKNOWN)],
)  # fmt: skip
def test_what_a_state_means_for_a_run_that_wrote_nothing_down(cluster, job, state, status, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    one = job()
    handle = SlurmLauncherSpec().build().submit(one)
    handle._ending.patience = 0.0
    says(cluster, f"7 {state}", "8 RUNNING")
    assert handle.poll() == status
    assert (status is None) == (not one.log.exists())
    if status is not None:
        assert one.log.read_text().startswith(f"error: SLURM's job 7: {state}; see ")


def test_a_run_that_is_queued_again_goes_on_and_one_that_is_not_was_interrupted(cluster, job):
    one = job()
    handle = SlurmLauncherSpec().build().submit(one)
    folder_of(one).mkdir(exist_ok=True)
    status_of(folder_of(one), "7").write_text("143\n")
    says(cluster, "7 PENDING")
    assert handle.poll() is None
    says(cluster, "7 FAILED")
    assert handle.poll() == 143
    assert not one.log.exists()


def test_a_run_that_ended_needs_no_question_to_slurm(cluster, job):
    one = job()
    handle = SlurmLauncherSpec().build().submit(one)
    status_of(folder_of(one), "7").write_text("0\n")
    (cluster / "down").write_text("")
    assert handle.poll() == 0 and not (cluster / "asked").exists()


def test_while_slurm_does_not_answer_nothing_has_ended(cluster, job, caplog):
    handle = SlurmLauncherSpec().build().submit(job())
    (cluster / "down").write_text("")
    assert handle.poll() is None and handle.poll() is None
    assert caplog.text.count("squeue does not answer") == 1


def test_a_job_that_slurm_has_forgotten_is_looked_up_in_its_accounts(cluster, job):
    launcher = SlurmLauncherSpec().build()
    handles = [launcher.submit(job(name)) for name in ("one", "two")]
    for handle in handles:
        handle._ending.patience = 0.0
    says(cluster)
    (cluster / "accounts").write_text("CANCELLED by 0\n")
    assert handles[0].poll() == 143
    (cluster / "accounts").unlink()
    assert handles[1].poll() == UNKNOWN


def test_one_question_serves_all_jobs(cluster, job, monkeypatch):
    monkeypatch.setattr(slurm, "ASK_EVERY", 60.0)
    launcher = SlurmLauncherSpec().build()
    handles = [launcher.submit(job(f"run{index}")) for index in range(5)]
    for _ in range(3):
        assert [handle.poll() for handle in handles] == [None] * 5
    assert len((cluster / "asked").read_text().splitlines()) == 1


def test_a_job_is_found_again_by_its_number(cluster, job):
    one = job()
    reference = SlurmLauncherSpec().build().submit(one).reference
    launcher = SlurmLauncherSpec(concurrent=1).build()
    again = launcher.attach(one, reference)
    assert again.reference == reference and again.poll() is None and not launcher.room(one)
    status_of(folder_of(one), "7").write_text("0\n")
    assert again.poll() == 0 and launcher.room(one)
    for other in ("", "machine 12 1.5", "ray one", "slurm", "slurm x"):
        assert launcher.attach(one, other) is None


def test_a_sweep_that_goes_on_with_another_launcher_finds_what_waits_in_the_queue(cluster, job, monkeypatch, caplog):
    one, here = job(), LocalLauncher(1, None)
    reference = SlurmLauncherSpec().build().submit(one).reference
    found = attached(here, one, reference)
    assert found.reference == reference and found.poll() is None
    status_of(folder_of(one), "7").write_text("0\n")
    assert found.poll() == 0
    monkeypatch.setenv("PATH", str(cluster.parent))
    assert attached(here, one, reference) is None and "may wait in a queue as slurm 7" in caplog.text


def test_a_run_is_asked_to_save_first_and_then_made_to_stop(cluster, job):
    handle = SlurmLauncherSpec().build().submit(job())
    handle.cancel()
    handle.cancel()
    said = (cluster / "cancelled").read_text().splitlines()
    assert said == ["--signal=TERM 7", "--state=PENDING 7", "7"]


def test_at_most_so_many_are_in_the_queue(cluster, job):
    launcher = SlurmLauncherSpec(concurrent=2).build()
    first = job("first")
    for one in (first, job("second")):
        assert launcher.room(one)
        launcher.submit(one)
    assert not launcher.room(first)
    status_of(folder_of(first), "7").write_text("0\n")
    assert launcher.room(first)


def test_what_sbatch_refuses_is_told_in_its_words(cluster, job):
    with pytest.raises(ResourceError, match="^reject: cannot be submitted: sbatch: error: QOSMaxSubmit"):
        SlurmLauncherSpec().build().submit(job("reject"))


def test_what_is_missing_or_makes_no_sense_is_said_before_anything_runs(cluster, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"launcher\.options\.nodes: is a key of its own"):
        SlurmLauncherSpec(options={"nodes": 3}).build()
    with pytest.raises(ConfigError, match=r"launcher\.nodes: cannot be given with launcher\.cluster=local"):
        SlurmLauncherSpec(cluster="local", nodes=2).build()
    with pytest.raises(ConfigError, match=r"launcher\.options"):
        read_sweep(["mixer=attention,gla", "launcher=slurm", "launcher.options={no spaces: 1}"], ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="this machine has no sbatch"):
        SlurmLauncherSpec().build()
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"needs the package submitit.*pip install 'efficient-lm\[cluster\]'"):
        SlurmLauncherSpec().build()


def test_the_file_of_the_group_is_the_defaults():
    config, _ = read_sweep(["mixer=attention,gla", "launcher=slurm"], ())
    assert config.launcher == SlurmLauncherSpec() and config.launcher.remote and not config.launcher.counts_memory


SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *heard: sys.exit(143))
print("here", flush=True)
time.sleep(600)
"""


def test_jobs_of_this_machine(job, until):
    pytest.importorskip("submitit")
    launcher = SlurmLauncherSpec(cluster="local", gpus=0, minutes=5).build()
    jobs = [job("fails", "raise SystemExit(5)"), job("saves", SAVES), job("dies", SAVES)]
    handles = [launcher.submit(each) for each in jobs]
    fails, saves, dies = handles
    until(lambda: all(each.log.exists() and each.log.read_text() for each in jobs[1:]))
    again = SlurmLauncherSpec(cluster="local", gpus=0, minutes=5).build().attach(jobs[1], saves.reference)
    again.cancel()
    psutil.Process(int(dies.reference.split()[2])).children()[0].kill()
    until(lambda: all(handle.poll() is not None for handle in (*handles, again)))
    assert [handle.poll() for handle in (fails, saves, again)] == [5, 143, 143]
    # Who is killed writes nothing down.
    assert dies.poll() == 137
    assert launcher.attach(jobs[0], fails.reference) is None
