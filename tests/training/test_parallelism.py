"""Every preset of parallelism trains every family as one device does, moments live where parameters do, and what
cannot be is refused."""

from pathlib import Path

import jax
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.language_model import ModelSpec
from efficient_lm.training.parallelism import ParallelismSpec
from kernels_pallas.partition import place

PRESETS = ("data", "fsdp", "fsdp_tensor", "expert", "context")
FAMILIES = ["transformer", "hybrid", "moe"]
RUN = """
    import sys
    sys.path.insert(0, {folder!r})
    from parallel_runs import main
    main({preset!r}, {models!r})
"""


def equal(on_devices, preset, models):
    return on_devices(8, RUN.format(folder=str(Path(__file__).parent), preset=preset, models=models)) == "equal"


def test_ten_steps_of_a_preset(on_devices):
    assert equal(on_devices, "fsdp_tensor", ["transformer"])


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_ten_steps_of_every_preset(preset, on_devices):
    assert equal(on_devices, preset, FAMILIES)


ACCUMULATION = """
    import sys
    sys.path.insert(0, {folder!r})
    from parallel_runs import check_accumulation
    check_accumulation()
"""


@pytest.mark.slow
def test_gradients_of_micro_batches_are_exchanged_once(on_devices):
    assert on_devices(8, ACCUMULATION.format(folder=str(Path(__file__).parent))) == "once"


def spec(mixer):
    block = {"mixer": mixer, "ffn": {"kind": "swiglu"}}
    return ModelSpec.model_validate({"width": 32, "vocab_size": 64, "blocks": {"layer": block}, "layout": ["layer"]})


@pytest.mark.parametrize(
    ("mixer", "length", "words"),
    [
        ({"kind": "attention"}, 30, "train.sequence_length: 30 does not divide over 4 devices of "
         "parallelism.mesh.context; nearest valid: 28 or 32"),
        ({"kind": "attention", "implementation": "cudnn"}, 32,
         "model.blocks.layer.mixer.implementation: 'cudnn' returns no logsumexps"),
        ({"kind": "parallel", "second": {"mixer": {"kind": "attention", "implementation": "cudnn"}}}, 32,
         "model.blocks.layer.mixer.second.mixer.implementation: 'cudnn'"),
    ],
)  # fmt: skip
def test_what_tokens_cannot_be_divided_is_refused(mixer, length, words):
    layout = ParallelismSpec(mesh={"context": 4}).build(jax.devices()[:1] * 4)
    with pytest.raises(ConfigError) as error:
        layout.check_context(spec(mixer), length)
    assert words in str(error.value)


def test_mesh_axes_have_names():
    with pytest.raises(ConfigError, match=r"parallelism.mesh.contxt: no such axis; did you mean 'context'"):
        ParallelismSpec(mesh={"contxt": 1}).build(jax.devices()[:1])


def test_parameters_go_where_the_first_rule_that_fits_says():
    sizes, rules = {"fsdp": 4, "tensor": 2}, {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}

    def home(**axes):
        return tuple(place(tuple(axes), tuple(axes.values()), rules, sizes))

    assert home(layers=3, embed=8, gate_up=2, mlp=6) == (None, "fsdp", None, "tensor")
    assert home(layers=3, mlp=6, embed=8) == (None, "tensor", "fsdp")
    assert home(vocab=31, embed=8) == (None, "fsdp"), "what does not divide stays whole"
    assert home(layers=4, embed=8) == (None, None), "so does a vector over fsdp"
    assert home(layers=4, heads=2) == (None, "tensor")
