"""Random configs: whatever the checks let through builds, and its first step has a finite loss and gradient."""

import math
import random
from typing import Annotated, Any, Literal, get_args, get_origin

import jax
import numpy as np
import pytest

from efficient_lm.composition import ConfigRoots
from efficient_lm.config import load_run_config
from efficient_lm.errors import ConfigError
from efficient_lm.training.setup import prepare
from efficient_lm.training.step import initial_state

CAMPAIGN, PIECES = 500, 20
"""Configs of the whole campaign, and the tests it is cut into; ten seconds for each on one core, most to compile."""
BUILT, FAST = 5, 1
"""Of the first ones, how many `make test` builds, and how many of them it runs."""

MIXERS = {
    "attention": ["heads=2"], "based": ["heads=2", "feature_size=4", "window=8"], "delta_net": ["heads=2"],
    "differential_attention": ["heads=4"], "gated_delta_net": ["heads=2"], "gla": ["heads=2", "rank=4"],
    "hedgehog": ["heads=2"], "hgrn2": ["heads=2"], "kda": ["heads=2"], "lightning": ["heads=2"],
    "linear_attention": ["heads=2"], "mamba": ["state_size=4"], "mamba2": ["head_size=8", "state_size=8"],
    "mamba_mixer": ["token.state_size=4", "channel.state_size=4"], "matmul_free": [],
    "multi_latent": ["heads=2", "latent_size=8"], "native_sparse": ["heads=2", "block_size=4", "selected_blocks=2"],
    "parallel": ["first.mixer.head_size=8", "second.mixer.heads=2"], "retention": ["heads=2"],
    "rg_lru": ["inner=16", "heads=2"], "short_conv": [],
}  # fmt: skip
"""Every mixer that a causal objective takes, with what makes it small."""
FFNS = ["geglu", "glu", "mlp", "moe", "reglu", "swiglu"]
DEPTHS = ["layer_drop", "mixture_of_depths", "router_skip"]
TASKS = ["compression", "fuzzy_recall", "induction_heads", "memorization", "multi_query_recall", "noisy_recall",
         "parity", "passkey", "phonebook", "selective_copying", "word_problem"]  # fmt: skip
OPTIMIZERS, SCHEDULES = (ConfigRoots().choices(group) for group in ("optimizer", "schedule"))
NESTINGS = ["joint", "mixed", "sample", "sandwich"]
FIXED = ("run.", "init_from", "parallelism.mesh", "parallelism.rules", "data.source", "data.threads", "tracker",
         "train.minutes", "train.kernels", "model.vocab_size", "model.width")  # fmt: skip
"""Keys that are not varied: paths, devices and what makes a model large."""


def chosen(draw: random.Random, text: Any, folder: Any) -> list[str]:
    """A choice of every group, small."""
    mixer, data = draw.choice(list(MIXERS)), draw.choice(["text", "text", *TASKS])
    given = [f"run.dir={folder}", f"run.seed={draw.randrange(1000)}", "train.steps=4", "model.width=16"]
    given += [f"model.repeats={draw.choice([1, 1, 2])}", f"train.batch_size={draw.choice([2, 4])}"]
    given += [f"mixer={mixer}", *(f"mixer.{value}" for value in MIXERS[mixer]), f"ffn={draw.choice(FFNS)}"]
    given += [f"optimizer={draw.choice(OPTIMIZERS)}", f"schedule={draw.choice(SCHEDULES)}"]
    given += [f"precision={draw.choice(['float32', 'float32', 'bfloat16'])}"]
    if data == "text":
        given += ["data=files", f"data.source.paths=[{text}]", "tokenizer=bytes"]
        given += [f"train.sequence_length={draw.choice([8, 16, 24])}"]
    else:
        given += [f"data={data}", f"data.examples={draw.choice(['null', 64])}"]
    if draw.random() < 0.3:
        given.append(f"depth={draw.choice(DEPTHS)}")
    if draw.random() < 0.25:
        second = draw.choice(list(MIXERS))
        values = "".join(f", {value.replace('=', ': ')}" for value in MIXERS[second] if "." not in value)
        block = f"{{mixer: {{kind: {second}{values}}}, ffn: {{kind: {draw.choice(['mlp', 'swiglu'])}}}}}"
        given += [f"+model.blocks.second={block}", "model.layout=[layer,second]"]
    if draw.random() < 0.15:
        axis = draw.choice(["ffn", "heads", "layers", "width"])
        given += [f"nesting={draw.choice(NESTINGS)}", f"model.elastic.{axis}=[0.5,1]"]
    if draw.random() < 0.1:
        given.append("model.exits={every: 1}")
    return given


def varied(draw: random.Random, place: Any) -> str | None:
    """Another value of a key, as an override; None for one whose type says nothing of its size."""
    member = draw.choice(place.members)
    kind = get_args(member)[0] if get_origin(member) is Annotated else member
    if kind is type(None):
        value: Any = "null"
    elif kind is bool:
        value = str(not place.value).lower()
    elif kind is int:
        value = draw.choice([1, 1, 2, 2, 3, 4, 8])
    elif kind is float:
        value = draw.choice([0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 1e-3])
    elif get_origin(kind) is Literal:
        value = draw.choice(get_args(kind))
    else:
        return None
    return f"{place.key}={value}"


def chosen_and_varied(number: int, places: Any, text: Any, folder: Any) -> tuple[list[str], Any, int]:
    """Overrides and setup of the config of this number, and how many values were refused on the way to it.

    Values that the checks refuse are left out again: they say so by a `ConfigError`, and by nothing else.
    """
    draw, refused = random.Random(number), 0
    while True:
        given = chosen(draw, text, folder)
        try:
            config, setup = _prepared(given)
            break
        except ConfigError:
            refused += 1
    several = [place for place in places(config) if not place.key.startswith(FIXED)]
    others = [varied(draw, place) for place in draw.sample(several, 2 + draw.randrange(8))]
    others = [override for override in others if override is not None]
    while others:
        try:
            return [*given, *others], _prepared([*given, *others])[1], refused
        except ConfigError as error:
            assert 0 < len(str(error).splitlines()) <= 4
            refused += 1
            del others[draw.randrange(len(others))]
    return given, setup, refused


def _prepared(given: list[str]) -> tuple[Any, Any]:
    config = load_run_config(given)
    return config, prepare(config)


def first_step(setup: Any, params: Any) -> dict[str, float]:
    """The metrics of a run's first step."""
    with setup.layout.active():
        batches = setup.data.train_batches(setup.config.train.batch_size)
        batch = {name: array for name, array in next(batches).items() if name != "target_bytes"}
        # From the host: the state is donated, and arrays of it may be one and the same.
        state = jax.tree.map(np.asarray, initial_state(params, setup.optimizer, setup.averaged))
        _, metrics = setup.step(state | setup.kept_in_record({}), setup.layout.batch(batch))
    return {name: float(value) for name, value in metrics.items() if jax.numpy.ndim(value) == 0}


def campaign(numbers: range, places: Any, start: Any, text: Any, folder: Any) -> list[str]:
    """What was wrong with the configs of these numbers."""
    faults = []
    for number in numbers:
        given: list[str] = []
        try:
            given, setup, _ = chosen_and_varied(number, places, text, folder)
            metrics = first_step(setup, start(setup.model))
            wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
            faults += [f"{number}: {given}: {name} is {metrics[name]}" for name in wrong]
        except Exception as error:
            faults.append(f"{number}: {given}: {type(error).__name__}: {str(error)[:300]}")
        jax.clear_caches()
    return faults


def test_random_valid_configs_are_built(places, text, tmp_path):
    for number in range(FAST, BUILT):
        _, setup, _ = chosen_and_varied(number, places, text, tmp_path / "run")
        assert setup.abstract_state()["parameters"]


@pytest.mark.slow
def test_random_valid_configs_run_a_step(places, drawn, text, tmp_path):
    assert campaign(range(FAST), places, drawn, text, tmp_path / "run") == []
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
def test_the_whole_campaign_of_valid_configs(piece, places, drawn, text, tmp_path):
    size = CAMPAIGN // PIECES
    faults = campaign(range(piece * size, (piece + 1) * size), places, drawn, text, tmp_path / "run")
    assert faults == [], "\n".join(faults)
