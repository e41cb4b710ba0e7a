"""Which machine is meant, what its devices can send each other, and what is said where its compiler is missing."""

import importlib.util
from types import SimpleNamespace

import jax
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.training import memory
from efficient_lm.training.machines import Machine, _ports, _topology, elsewhere, here
from kernels_pallas import ahead


@pytest.mark.parametrize(
    ("target", "topology", "name"),
    [
        (None, None, None), ("cpu", None, None), ("gpu", None, "h200"), ("tpu", None, "v5p:2x2x1"),
        ("gpu", 8, "h200:8"), (None, 16, "h200:16"), ("gpu", "8x8", "h200:8x8"), (None, "h100:8", "h100:8"),
        (None, "v5p:4x4x4", "v5p:4x4x4"), ("tpu", "v6e:4x4", "v6e:4x4"),
    ],
)  # fmt: skip
def test_targets_and_topologies_have_names(target, topology, name):
    assert _topology(target, topology) == name


@pytest.mark.parametrize(
    ("target", "topology", "said"),
    [
        ("tpu", 8, "topology: '8' is none of tpus; valid, for example: v5e:2x2, v5p:2x2x1"),
        ("tpu", "h200:8", "topology: 'h200:8' is none of tpus"),
        ("gpu", "v5p:2x2x1", "topology: 'v5p:2x2x1' is none of gpus; valid, for example: 8 (H200s), h100:8"),
        (None, "a100:8", "topology: 'a100:8' is none; valid, for example: 8 (H200s), h100:8, h200:8x8; v5e:2x2"),
    ],
)
def test_other_topologies_are_refused(target, topology, said):
    with pytest.raises(ConfigError) as caught:
        _topology(target, topology)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("shape", "hosts"), [("", (1, 1)), ("8", (1, 8)), ("3", (1, 3)), ("64", (8, 8)), ("8x4", (8, 4))]
)
def test_gpus_are_on_hosts_of_eight(shape, hosts):
    assert ahead._hosts(f"h200:{shape}", shape) == hosts


@pytest.mark.parametrize(("shape", "said"), [("12", "nearest: 8"), ("2x2x2", "hosts and the GPUs of each"), ("0", "")])
def test_other_numbers_of_gpus_are_refused(shape, said):
    with pytest.raises(ValueError, match=f"topology 'h200:{shape}': .*{said}"):
        ahead._hosts(f"h200:{shape}", shape)


@pytest.mark.parametrize(
    ("topology", "package"), [("v5p:2x2x1", "libtpu"), ("h200:8", "jax-cuda13-plugin"), ("h100:8", "jax-cuda13-plugin")]
)
def test_a_missing_compiler_is_named_with_what_installs_it(topology, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        elsewhere(topology)
    assert str(caught.value) == (
        f"target: the package {package} is missing; pip install 'efficient-lm[ahead]' (in a checkout: make ahead)"
    )


def gpus(hosts, each):
    device = {"device_kind": "NVIDIA H200", "platform": "gpu", "compute_capability": "9.0"}
    return Machine(tuple(SimpleNamespace(process_index=host, **device) for host in range(hosts) for _ in range(each)))


def test_gpus_send_by_nvlink_and_by_the_cards_of_those_that_send_together():
    assert gpus(1, 8).bandwidth() == (450e9, "NVLink of 450 GB/s one way")
    two = gpus(2, 8)
    assert two.bandwidth(range(8))[0] == 450e9
    assert two.bandwidth([0, 8])[0] == 50e9
    assert two.bandwidth([0, 1, 8, 9])[0] == 100e9
    assert two.bandwidth()[0] == 400e9 and "each of 8 GPUs" in two.bandwidth()[1]
    assert str(two) == "16 × NVIDIA H200 (this machine)" and str(two.alone()) == "one NVIDIA H200"


@pytest.mark.parametrize(
    ("sizes", "kind", "ports"),
    [((2, 2, 1), "TPU v5", 2), ((4, 4, 4), "TPU v5", 6), ((2, 4, 4), "TPU v5", 5), ((4, 4, 1), "TPU v5 lite", 2),
     ((16, 16, 1), "TPU v6 lite", 4), ((1, 1, 1), "TPU v5 lite", 0)],
)  # fmt: skip
def test_links_of_tpus_close_to_rings_in_whole_cubes_and_pods(sizes, kind, ports):
    x, y, z = map(range, sizes)
    assert _ports([(a, b, c) for a in x for b in y for c in z], kind) == ports


def test_this_machine_has_its_memory_and_virtual_devices_have_none(tmp_path, monkeypatch):
    one = here(jax.devices()[:1])
    assert one.memory == memory.machine_memory() > 1e9 and one.bandwidth() is None
    assert here(jax.devices()[:1] * 2).memory is None
    (tmp_path / "max").write_text("123456\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(memory, "LIMITS", (str(tmp_path / "max"), str(tmp_path / "none"), str(tmp_path / "absent")))
    assert memory.machine_memory() == 123456
