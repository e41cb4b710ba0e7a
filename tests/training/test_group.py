"""Which processes the environment speaks of: plain variables, SLURM's, half-given ones."""

import os

import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.training.group import Group, free_address, group, join, refuse_many

PLAIN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {"SLURM_JOB_ID": "4097", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[007-010],big1", "SLURM_PROCID": "5",
         "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "10", "SLURM_NTASKS": "99",
         "SLURM_STEP_TASKS_PER_NODE": "2(x5)"}  # fmt: skip


def test_plain_variables():
    assert group(PLAIN) == Group("10.0.0.1", 1234, 4, 3)
    assert group({}) is None and group({"JAX_NUM_PROCESSES": "1"}) is None
    found = group(PLAIN | {"JAX_COORDINATOR_ADDRESS": "[::1]:80", "JAX_LOCAL_DEVICE_IDS": "2,3"})
    assert (found.host, found.port, found.local_devices) == ("::1", 80, (2, 3))


@pytest.mark.parametrize("nodes, host", [("node[007-010],big1", "node007"), ("a1", "a1"), ("a1,b[2-3]", "a1"),
                                         ("gpu-[3,5-7]", "gpu-3"), ("x[12]", "x12")])  # fmt: skip
def test_slurm_gives_the_first_machine_and_a_port_of_the_job(nodes, host):
    found = group(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert (found.host, found.port, found.count, found.index) == (host, 61441, 10, 5)


def test_tasks_of_a_machine_share_its_devices_one_each_unless_slurm_divided_them():
    assert group(SLURM).local_devices == (1,)
    assert group(SLURM | {"SLURM_GPUS_PER_TASK": "1"}).local_devices == ()
    assert group(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x10)"}).local_devices == ()


def test_plain_variables_go_before_those_of_slurm():
    assert group(SLURM | {"JAX_COORDINATOR_ADDRESS": "h:99"}).host == "h"
    assert group(SLURM | {"JAX_COORDINATOR_PORT": "70"}).port == 70
    assert group(SLURM | {"JAX_NUM_PROCESSES": "1"}) is None
    assert group(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert group({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) is None, "a batch script is no step"


@pytest.mark.parametrize("changes, words", [
    ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID: is not set, though JAX_COORDINATOR_ADDRESS=10.0.0.1:1234 is"),
    ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS: is not set, though JAX_NUM_PROCESSES=4 is"),
    ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES: is not set"),
    ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES: 'four' is not a whole number of at least 1"),
    ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID: 4 is not below JAX_NUM_PROCESSES=4; valid: 0 to 3"),
    ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS: '10.0.0.1' is not host:port"),
    ({"JAX_LOCAL_DEVICE_IDS": "a"}, "JAX_LOCAL_DEVICE_IDS: 'a' is not a list of numbers"),
])  # fmt: skip
def test_what_makes_no_sense_is_named(changes, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        group(PLAIN | changes)


def test_an_actor_joins_and_other_verbs_refuse(monkeypatch):
    for name in PLAIN:
        monkeypatch.setenv(name, "")
    address = free_address("127.0.0.1")
    join(address, 2, 1)
    assert f"{group().host}:{group().port}" == address and (group().count, group().index) == (2, 1)
    with pytest.raises(ConfigError, match="evaluate: runs as one process, and 2 were started"):
        refuse_many("evaluate")
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID: 2 is not below"):
        join(address, 2, 2)
    os.environ["JAX_NUM_PROCESSES"] = "1"
    refuse_many("evaluate")
