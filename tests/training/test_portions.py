"""Batches and sequences that grow: which rows a step reads, exact resumption, counting, refusals."""

import json
import logging

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from efficient_lm.cli.main import main
from efficient_lm.config import load_run_config
from efficient_lm.data.batch_sizes import BatchSizes
from efficient_lm.data.dataset import TextDataSpec
from efficient_lm.data.packing import Fragment, pack
from efficient_lm.data.sources import FilesSource
from efficient_lm.data.store import open_store
from efficient_lm.data.tokenizers import BytesSpec
from efficient_lm.errors import ConfigError
from efficient_lm.training import loop
from efficient_lm.training.accounting import plan, run_flops_per_token, step_flops_per_token
from efficient_lm.training.portions import Portions, cut
from efficient_lm.training.reporting import read_metrics

STAGES = [(0, 2), (3, 4), (7, 6)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    random = np.random.default_rng(0)
    texts = [f"<{i}>" + "".join(random.choice([*"abcxyz "], random.integers(0, 60))) for i in range(45)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def keys(path, *more):
    model = ["model.width=8", "model.repeats=1", "mixer.heads=1", "ffn.hidden=16", "tokenizer=bytes"]
    data = ["data=files", f"data.source.paths=[{path}]", "train.steps=12", "train.batch_size=6"]
    return [*model, *data, "train.sequence_length=32", "train.log_every=1", *more]


def portions(*more):
    return Portions(load_run_config(keys("none", *more)).train)


def test_rows_follow_those_of_the_steps_before():
    sizes = BatchSizes(STAGES)
    rows = [sizes.rows(step) for step in range(12)]
    assert rows == [2] * 3 + [4] * 4 + [6] * 5 and sizes.distinct == {2, 4, 6}
    assert [sizes.first(step) for step in range(13)] == [0, *np.cumsum([*rows])]
    assert [BatchSizes.of(8).first(step) for step in (0, 1, 10**12)] == [0, 8, 8 * 10**12]


@pytest.mark.parametrize("packing", ["split", "first_fit"])
def test_every_row_once_in_any_company(path, packing):
    """Whatever the sizes, the number of processes, and where one begins."""
    spec = TextDataSpec(source=FilesSource(paths=str(path)), packing=packing)
    data = spec.open(BytesSpec().build(), 16, 3)
    sizes = BatchSizes(STAGES)

    def tokens(count, *arguments):
        batches = data.train_batches(*arguments)
        return [next(batches)["tokens"] for _ in range(count)]

    whole, one = tokens(9, sizes), tokens(34, 1)
    np.testing.assert_array_equal(np.concatenate(whole), np.concatenate(one))
    for start in (2, 3, 8):
        assert all(map(np.array_equal, tokens(9 - start, sizes, start), whole[start:]))
    parts = [tokens(7, sizes, 2, index, 2) for index in range(2)]
    assert all(np.array_equal(np.concatenate(both), batch) for *both, batch in zip(*parts, whole[2:], strict=True))
    with pytest.raises(ConfigError, match="a batch of 2 rows cannot be divided among 4 processes"):
        data.train_batches(sizes, 8, 0, 4)


def test_pieces_of_rows_are_rows_packed_so(path):
    store = open_store(FilesSource(paths=str(path)), BytesSpec().build())
    row = [Fragment(0, 0, 3), Fragment(1, 5, 9), Fragment(2, 0, 2)]
    found = cut(pack(store, [row, [Fragment(3, 0, 7)]], 16), 4)
    wanted = [[(0, 0, 3), (1, 5, 1)], [(1, 6, 4)], [(1, 10, 4)], [(2, 0, 2)], [(3, 0, 4)], [(3, 4, 3)], [], []]
    packed = pack(store, [[Fragment(*piece) for piece in pieces] for pieces in wanted], 4)
    assert found.keys() == packed.keys()
    for name, array in packed.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].dtype == array.dtype


def test_growth_doubles_or_adds():
    assert [(p.step, *p.batch) for p in portions("train.batch_schedule={start: 1, until: 0.5}").portions] == [
        (0, 1, 32), (2, 2, 32), (4, 4, 32), (6, 6, 32),
    ]  # fmt: skip
    both = portions(
        "train.batch_schedule={start: 2, add: 2, until: 6}", "train.sequence_schedule=[{until: 4, size: 8}]"
    )
    assert [(p.step, *p.batch) for p in both.portions] == [(0, 8, 8), (3, 16, 8), (4, 4, 32), (6, 6, 32)]
    assert both.tokens() == 32 * (3 * 2 + 3 * 4 + 6 * 6) and both.tokens(5) == 32 * (3 * 2 + 2 * 4)
    assert both.mean(float, 6) == (8 * (3 * 2 + 4) + 32 * 2 * 4) / 18 and both.mean(float, 2) == 8
    assert both.largest.batch == (6, 32)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("batch_schedule=[{until: 4, size: 2},{until: 3, size: 4}]", r"_schedule\[1\]\.until: step 3, .* at step 4"),
        ("batch_schedule=[{until: 12, size: 2}]", r"batch_schedule\[0\]\.until: step 12, but the run ends at step 12"),
        ("batch_schedule={start: 8, until: 6}", r"batch_schedule\.start: 8 does not grow to 6, .* at most 5"),
        ("batch_schedule={start: 1, add: 1, until: 3}", r"until: 3 steps .* 5 sizes before 6; at least 5"),
        ("batch_schedule={start: 1, untill: 3}", r"batch_schedule\.untill: unknown key; did you mean 'until'"),
        ("batch_schedule=[{size: 1}]", r"batch_schedule\.0\.until: a value is needed"),
        ("batch_schedule=[8,16]", r"batch_schedule\.0: expected a mapping"),
        ("sequence_schedule=[{until: 3, size: 24}]", r"24 tokens do not divide train.sequence_length=32; .* 16, 32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(given, said):
    with pytest.raises(ConfigError, match=said):
        portions(f"train.{given}")


def test_sizes_divide_into_micro_batches_and_over_devices(path):
    with pytest.raises(ConfigError, match="accumulate=2 micro-batches do not divide the 3 rows of step 0"):
        portions("train.accumulate=2", "train.batch_schedule=[{until: 3, size: 3}]")
    with pytest.raises(ConfigError, match="sequence_schedule: rows of a task are not cut"):
        load_run_config(["data=parity", "train.sequence_schedule=[{until: 3, size: 8}]"])

    class TwoDevices:
        def check_batch(self, rows, accumulate, key):
            if rows % 2:
                raise ConfigError(f"{key}: {rows}")

    with pytest.raises(ConfigError, match=r"train.batch_schedule, from step 0: 3"):
        portions("train.batch_schedule=[{until: 3, size: 3}]").check(TwoDevices(), 1)


GROWING = ["train.batch_schedule={start: 2, add: 2, until: 8}", "train.sequence_schedule=[{until: 6, size: 16}]"]


@pytest.fixture(scope="module")
def grown(path, tmp_path_factory):
    """A run in one go, its log, and the same run stopped and resumed in each of its portions."""
    folder = tmp_path_factory.mktemp("runs")
    log, pieces = logging.getLogger("efficient_lm.training.portions"), folder / "pieces"
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    summary = loop.train(load_run_config(keys(path, *GROWING, f"run.dir={folder / 'whole'}")))
    log.removeHandler(handler)
    for more in (["train.stop_at=5"], ["train.stop_at=7"], []):
        ended = loop.train(load_run_config(keys(path, *GROWING, f"run.dir={pieces}", *more)))
        assert ended["step"] == (int(more[0][-1]) if more else 12)
    return folder, summary, said


def saved(folder):
    return ocp.load_checkpointables(folder / "checkpoints" / "12")


def test_stopping_in_between_is_the_same_to_the_bit(grown):
    folder, *_ = grown
    whole, pieces = (saved(folder / name) for name in ("whole", "pieces"))
    for name in ("parameters", "optimizer"):
        assert all(map(np.array_equal, jax.tree.leaves(whole[name]), jax.tree.leaves(pieces[name])))
    rows = [read_metrics(folder / name) for name in ("whole", "pieces")]
    figures = [[(row["step"], row["loss"], row["tokens"]) for row in run if "loss" in row] for run in rows]
    assert figures[0] == figures[1] and len(figures[0]) == 12


def test_rows_tokens_and_flops_are_counted(grown, path):
    folder, summary, said = grown
    rows = [row for row in read_metrics(folder / "whole") if "loss" in row]
    assert [(row["batch_size"], row["sequence_length"]) for row in rows] == (
        [(4, 16)] * 4 + [(8, 16)] * 2 + [(4, 32)] * 2 + [(6, 32)] * 4
    )
    assert [line.split(" (")[0] for line in said] == [
        "from step 0 on: 4 rows of 16 tokens", "from step 4 on: 8 rows of 16 tokens",
        "from step 6 on: 4 rows of 32 tokens", "from step 8 on: 6 rows of 32 tokens",
    ]  # fmt: skip
    # Only the last row of an epoch has padding.
    places = 32 * (4 * 2 + 4 * 4 + 4 * 6)
    assert places - 2 * 32 < summary["tokens"] <= places
    config = load_run_config(keys(path, *GROWING, "model.vocab_size=259"))
    model, spent = config.model.build(), [64 * 4 + 128 * 2, 128 * 2 + 192 * 4]
    short, full = (step_flops_per_token(config, model, length) for length in (16, 32))
    mean = (short * spent[0] + full * spent[1]) / sum(spent)
    assert short < full and run_flops_per_token(config, model) == pytest.approx(mean)
    assert summary["training_flops"] == pytest.approx(mean * summary["tokens"], rel=0.01)
    figures = plan(config)
    assert figures["tokens"] == places and figures["training_flops"] == pytest.approx(mean * places)
    assert figures["programs"][1] == (4, 8, 16) and figures["flops_per_step"] == pytest.approx(full * 6 * 32)


def test_the_verb_plan_shows_each_program(path, capsys):
    assert main(["plan", *keys(path, *GROWING)]) == 0
    printed = capsys.readouterr().out
    assert "from 4 on" in printed and "8 × 16 tokens" in printed and "for 1,536 tokens" in printed
