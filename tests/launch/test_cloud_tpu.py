"""The script for Google Cloud's TPUs; a gcloud that stands in for it runs on "each machine" what it is told."""

import re
import signal
import subprocess
import threading

import pytest

# States are read off a file, one a question; the last one stays. Commands for the machines are run for two of them.
GCLOUD = r"""
cd "$FAKE"
case "$*" in
    *"queued-resources describe"*)
        head -n 1 states
        [ "$(wc -l < states)" -gt 1 ] && sed -i 1d states
        exit 0 ;;
    *"tpu-vm describe"*) echo "10.0.0.2;10.0.0.3" ;;
    *"tpu-vm ssh"*)
        for word in "$@"; do case $word in --command=*) command=${word#--command=} ;; esac; done
        for number in 0 1; do
            mkdir -p "home$number"
            (cd "home$number" && export NUMBER=$number HOME=$PWD TMPDIR=$PWD && bash -c "$command") || exit
        done ;;
esac
"""
PROGRAM = """
echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID" > joined
printf '%s\\n' "$@" > arguments
exit $(cat ../status 2>/dev/null || echo 0)
"""


@pytest.fixture
def cloud(tmp_path, commands, launched):
    """``cloud(states, *keys, **variables)`` → exit status and output; machines' homes are below its folder."""
    folder = tmp_path / "cloud"
    for number in (0, 1):
        program = folder / f"home{number}" / "efficient-lm" / ".venv" / "bin" / "efficient-lm"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/bash{PROGRAM}")
        program.chmod(0o700)
    commands(gcloud=GCLOUD, curl='echo "$NUMBER"', python3="true", tar="true")

    def run(states, *keys, **variables):
        (folder / "states").write_text("".join(f"{state}\n" for state in states))
        for number in (0, 1):
            uv = folder / f"home{number}" / ".local" / "bin" / "uv"
            uv.parent.mkdir(parents=True, exist_ok=True)
            uv.write_text(f'#!/bin/bash\necho "uv $*" >> {tmp_path / "calls"}\n')
            uv.chmod(0o700)
        given = {"PROJECT": "mine", "ZONE": "here", "POLL_SECONDS": "0", "FAKE": str(folder), **variables}
        process = launched("cloud_tpu.sh", "one", *keys, **given)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    run.folder = folder
    return run


def verbs(calls):
    """Which of gcloud's were called, in order."""
    found = [re.search(r"^gcloud compute tpus (queued-resources|tpu-vm) (\w+)", call) for call in calls]
    return [match[2] for match in found if match]


def test_a_slice_is_asked_for_used_by_all_its_machines_and_given_back(cloud, calls):
    status, output = cloud(["", "WAITING_FOR_RESOURCES", "ACTIVE"], "experiment=one", "data.source.paths=[a b]")
    assert status == 0, output
    assert verbs(calls()) == ["describe", "create", "describe", "describe", "scp", "ssh", "describe", "ssh", "delete"]
    asked = next(call for call in calls() if " create " in call)
    assert asked.endswith(
        "create one --project=mine --zone=here --node-id=one --accelerator-type=v5p-32 --runtime-version=v2-alpha-tpuv5"
    )
    for number in (0, 1):
        home = cloud.folder / f"home{number}"
        assert (home / "joined").read_text() == f"10.0.0.2:8476 2 {number}\n"
        assert (home / "arguments").read_text().splitlines() == ["train", "experiment=one", "data.source.paths=[a b]"]


def test_each_machine_installs_the_checkout_with_its_pinned_versions(cloud, calls):
    assert cloud(["ACTIVE"], "experiment=one", SETUP="touch $HOME/mounted", KEEP="yes")[0] == 0
    line = "uv pip install --quiet --constraint requirements.lock --editable .[tpu]"
    assert [call for call in calls() if call.startswith("uv")] == [line, line]
    assert (cloud.folder / "home1" / "mounted").exists()
    assert "delete" not in verbs(calls())


def test_a_slice_that_was_taken_away_is_replaced_and_the_run_goes_on(cloud, calls):
    (cloud.folder / "status").write_text("1")
    states = ["ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE", "ACTIVE"]
    status, output = cloud(states, "experiment=one", SPOT="yes")
    assert status == 1 and "slice one is still there, and costs" in output
    assert verbs(calls()).count("create") == 1 and verbs(calls()).count("delete") == 1
    assert next(call for call in calls() if " create " in call).endswith("--spot")


def test_what_an_earlier_call_left_running_is_stopped_first(cloud):
    left = subprocess.Popen(["sleep", "600"])
    # A process that has ended stays in the table until its parent has asked.
    threading.Thread(target=left.wait, daemon=True).start()
    (cloud.folder / "home1" / "efficient-lm.pid").write_text(f"{left.pid}\n")
    assert cloud(["ACTIVE"], "experiment=one", KEEP="yes")[0] == 0
    assert left.wait(timeout=10) == -signal.SIGTERM


def test_what_has_to_be_said_is(cloud, launched):
    process = launched("cloud_tpu.sh", "one", ZONE="here")
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0 and "PROJECT: the project that pays" in output
