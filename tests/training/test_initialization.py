"""Training that begins with another model's parameters."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.config import load_run_config
from efficient_lm.data.tokenizers import ByteTokenizer, SotuBPESpec
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.training.initialization import Source, matching_rows, transferred
from efficient_lm.training.loop import train

GOLDENS = Path(__file__).parent.parent / "goldens"


def published(family, folder):
    """A golden model with the bytes as its vocabulary, in Hugging Face format."""
    model = elm.from_hf(GOLDENS / family)
    spec = model.config.model.model_copy(update={"vocab_size": 257})
    params = spec.build().init(jax.random.key(1))
    config = model.config.model_copy(update={"model": spec})
    return elm.api.Model(config, params, ByteTokenizer(), origin=model.origin).to_hf(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return published("llama", tmp_path_factory.mktemp("published") / "llama")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} and {n * n}. " * 9}) + "\n" for n in range(30))
    )
    return tmp_path / "text.jsonl"


def begin(tmp_path, text, source, *overrides, steps=1, rate=0.0):
    """The model after training that changes nothing (the rate is zero, unless given)."""
    arguments = [
        f"init_from={source}", "data=files", f"data.source.paths={text}", f"run.dir={tmp_path / 'run'}",
        f"train.steps={steps}", "train.batch_size=2", "train.sequence_length=32", "optimizer.weight_decay=0",
        "schedule=constant", f"optimizer.learning_rate={rate or 1e-30}", *overrides,
    ]  # fmt: skip
    train(load_run_config(arguments))
    return elm.load(tmp_path / "run")


def equal(left, right):
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


def test_everything_is_taken_as_it_is(llama, text, tmp_path, caplog):
    with caplog.at_level("INFO"):
        model = begin(tmp_path, text, llama)
    source = elm.from_hf(llama)
    assert "are taken as they are" in caplog.text and "newly initialised" not in caplog.text
    assert model.config.model == source.config.model
    assert model.tokenizer.fingerprint == source.tokenizer.fingerprint
    assert equal(model.params, source.params)


def test_a_run_and_its_checkpoint_are_sources_too(llama, text, tmp_path):
    run = elm.from_hf(llama).save(tmp_path / "first")
    model = begin(tmp_path, text, run / "checkpoints" / "0")
    assert equal(model.params, elm.from_hf(llama).params)


def test_training_goes_on_and_back_out_with_the_published_config(llama, text, tmp_path):
    model = begin(tmp_path, text, llama, steps=3, rate=1e-2)
    assert not equal(model.params, elm.from_hf(llama).params)
    folder = model.to_hf(tmp_path / "out")
    stated = json.loads((folder / "config.json").read_text())
    original = json.loads((llama / "config.json").read_text())
    assert {name for name in original if stated.get(name) != original[name]} == set()
    ids = np.arange(40).reshape(2, 20)
    np.testing.assert_array_equal(elm.from_hf(folder).logits(ids), model.logits(ids))


@pytest.mark.slow
def test_a_stopped_run_resumes_and_does_not_begin_again(llama, text, tmp_path):
    whole = begin(tmp_path / "whole", text, llama, steps=4, rate=1e-2)
    begin(tmp_path / "cut", text, llama, steps=2, rate=1e-2)
    cut = begin(tmp_path / "cut", text, llama, steps=4, rate=1e-2)
    assert cut.step == whole.step == 4
    assert equal(cut.params, whole.params)


@pytest.mark.slow
def test_another_vocabulary_keeps_the_rows_of_known_tokens(llama, text, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        model = begin(tmp_path, text, llama, "tokenizer=sotu_bpe")
    source, theirs, ours = elm.from_hf(llama), ByteTokenizer(), SotuBPESpec().build()
    assert model.config.model.vocab_size == ours.vocab_size == 4096
    before, after = (np.asarray(m.params["embedding"]["tokens"]) for m in (source, model))
    letter = int(ours.encode("k")[0])
    np.testing.assert_array_equal(after[letter], before[ord("k")])
    np.testing.assert_array_equal(after[ours.end_of_text], before[theirs.end_of_text])
    word = int(ours.encode(" citizens")[0])
    np.testing.assert_allclose(after[word], before.mean(0), atol=1e-6)
    np.testing.assert_array_equal(
        np.asarray(model.params["head"]["weight"])[:, letter], np.asarray(source.params["head"]["weight"])[:, ord("k")]
    )
    assert equal(model.params["stack"], source.params["stack"])
    assert "embedding.tokens: 3,839 of 4,096 tokens are new" in caplog.text


def test_a_larger_vocabulary_with_the_same_tokenizer(llama, text, tmp_path, caplog):
    model = begin(tmp_path, text, llama, "model.vocab_size=300")
    before, after = (np.asarray(m.params["embedding"]["tokens"]) for m in (elm.from_hf(llama), model))
    np.testing.assert_array_equal(after[:257], before)
    assert "head.weight: 43 of 300 tokens are new" in caplog.text


@pytest.mark.slow
def test_a_longer_table_of_positions(text, tmp_path, caplog):
    source = published("gpt2", tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="learned_positions holds 128"):
        begin(tmp_path, text, source, "train.sequence_length=200")
    model = begin(tmp_path, text, source, "train.sequence_length=200", "model.learned_positions=200")
    before, after = (np.asarray(m.params["embedding"]["positions"]) for m in (elm.from_hf(source), model))
    np.testing.assert_array_equal(after[:128], before)
    assert 0 < after[128:].std() < 0.1
    assert "embedding.positions: 72 of 200 rows are newly initialised" in caplog.text


@pytest.mark.slow
def test_a_longer_context_of_rotary_positions_is_announced(llama, text, tmp_path, caplog):
    begin(tmp_path, text, llama, "train.sequence_length=160")
    assert "sequence_length 160 is beyond the 128 tokens" in caplog.text


@pytest.mark.slow
def test_new_layers_and_norms_are_announced(llama, text, tmp_path, caplog):
    model = begin(tmp_path, text, llama, "model.repeats=3", "model.blocks.layer.mixer.qk_norm.kind=rmsnorm")
    lines = [record.message for record in caplog.records if "newly initialised" in record.message]
    assert len(lines) == 1 and "layers.0.mixer.inner.key_norm.scale" in lines[0] and "more" in lines[0]
    before, after = (m.params["stack"]["segment_0"]["layer_0"]["ffn"] for m in (elm.from_hf(llama), model))
    assert equal(jax.tree.map(lambda leaf: leaf[:2], after), before)


@pytest.mark.slow
def test_layers_may_fall_into_other_segments(llama, text, tmp_path, caplog):
    local = "model.blocks.local={mixer: ${model.blocks.layer.mixer}, ffn: ${model.blocks.layer.ffn}}"
    model = begin(
        tmp_path,
        text,
        llama,
        local,
        "model.blocks.local.mixer.window=9",
        "model.layout=[layer,local]",
        "model.repeats=1",
    )
    source = elm.from_hf(llama).params["stack"]["segment_0"]["layer_0"]
    for index in range(2):
        layer = model.params["stack"][f"segment_{index}"]["layer_0"]
        assert equal(layer, jax.tree.map(lambda leaf, index=index: leaf[index : index + 1], source))
    assert "newly initialised" not in caplog.text


FAULTS = [
    (["model.blocks.layer.ffn.hidden=96"], ConfigError, "'mlp' may not change"),
    (["mixer=differential_attention"], ConfigError, "names the mixer of its blocks itself"),
    (["init_from=nowhere"], CheckpointError, "nowhere: neither a run directory"),
]


@pytest.mark.parametrize(("overrides", "kind", "message"), FAULTS)
def test_faults_are_named_and_leave_nothing(llama, text, tmp_path, overrides, kind, message):
    with pytest.raises(kind) as fault:
        begin(tmp_path, text, llama, *overrides)
    assert message in str(fault.value)
    assert not (tmp_path / "run").exists()


def test_matching_rows_of_one_tokenizer_are_the_same_numbers():
    rows = matching_rows(ByteTokenizer(), ByteTokenizer(), 257, 260)
    assert rows.tolist() == [*range(257), -1, -1, -1]


def test_a_table_may_have_fewer_rows_than_the_vocabulary():
    found = elm.from_hf(GOLDENS / "gemma3n")
    source = Source("gemma3n", found.model, found.params, ByteTokenizer(), None, None)
    larger = found.config.model.model_copy(update={"vocab_size": 100}).build()
    params = transferred(source, larger, ByteTokenizer(), jax.random.key(0))
    np.testing.assert_array_equal(params["layer_embedding"]["tokens"], found.params["layer_embedding"]["tokens"])
    np.testing.assert_array_equal(params["embedding"]["tokens"][:96], found.params["embedding"]["tokens"])
    assert params["embedding"]["tokens"].shape == (100, 32)
