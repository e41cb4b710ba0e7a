"""Folders in Hugging Face format: what is read, what is written, what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import efficient_lm as elm
from efficient_lm.data.tokenizers import ByteTokenizer, SotuBPESpec
from efficient_lm.errors import CheckpointError, ConfigError, DataError, ResourceError
from efficient_lm.interop import hugging_face
from efficient_lm.interop.tensors import write_safetensors
from efficient_lm.models.language_model import ModelSpec

GOLDENS = Path(__file__).parent.parent / "goldens"
IDS = np.arange(60).reshape(2, 30) % 90 + 3


@pytest.fixture
def llama(tmp_path):
    return Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama", copy_function=shutil.copy))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def shards(folder, size=20_000):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_safetensors(folder, tensors.items(), size)
    return sorted(folder.glob("model-*.safetensors"))


def test_shards_are_read_and_written(llama):
    want = elm.from_hf(llama).logits(IDS)
    files = shards(llama)
    assert len(files) > 3
    np.testing.assert_array_equal(elm.from_hf(llama).logits(IDS), want)
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    assert len({file.stat().st_mode for file in [*files, llama / "config.json"]}) == 1
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(array.nbytes for file in files for array in load_file(file).values())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_tensors_come_back_to_the_bit(llama, tmp_path, dtype):
    rewrite(llama, lambda tensors: tensors.update({name: array.astype(dtype) for name, array in tensors.items()}))
    edit(llama, dtype=np.dtype(dtype).name)
    model = elm.from_hf(llama)
    model.save(tmp_path / "run")
    for source, name in ((model, "direct"), (elm.load(tmp_path / "run"), "by_run")):
        folder = source.to_hf(tmp_path / name)
        assert (folder / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
        assert json.loads((folder / "config.json").read_text())["dtype"] == np.dtype(dtype).name


def test_values_that_would_change_are_written_in_float32(llama, tmp_path):
    rewrite(llama, lambda t: t.update({name: array.astype(ml_dtypes.bfloat16) for name, array in t.items()}))
    model = elm.from_hf(llama)
    model.params["head"]["norm"]["scale"] = model.params["head"]["norm"]["scale"] * 1.0001
    written = load_file(model.to_hf(tmp_path / "out") / "model.safetensors")
    assert written["model.norm.weight"].dtype == np.float32
    assert written["model.embed_tokens.weight"].dtype == ml_dtypes.bfloat16
    rounded = load_file(model.to_hf(tmp_path / "rounded", dtype="bfloat16") / "model.safetensors")
    assert {array.dtype for array in rounded.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_names_without_the_base_prefix(tmp_path):
    folder = Path(shutil.copytree(GOLDENS / "gpt2", tmp_path / "gpt2", copy_function=shutil.copy))
    want = elm.from_hf(folder).logits(IDS)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        # The causal mask that older folders hold is no parameter.
        tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)

    rewrite(folder, strip)
    np.testing.assert_array_equal(elm.from_hf(folder).logits(IDS), want)


def test_a_tied_head_may_be_there_and_only_a_different_one_unties(llama, caplog):
    edit(llama, tie_word_embeddings=True)
    rewrite(llama, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    tied = elm.from_hf(llama)
    assert tied.config.model.tied
    rewrite(llama, lambda t: t.pop("model.embed_tokens.weight"))
    np.testing.assert_array_equal(elm.from_hf(llama).logits(IDS), tied.logits(IDS))
    shutil.copy(GOLDENS / "llama" / "model.safetensors", llama / "model.safetensors")
    untied = elm.from_hf(llama)
    assert not untied.config.model.tied and "not tied" in caplog.text
    np.testing.assert_array_equal(untied.logits(IDS), elm.from_hf(GOLDENS / "llama").logits(IDS))


def swap_shape(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].T.copy()


def as_integers(tensors):
    tensors["model.norm.weight"] = np.ones(32, np.int8)


TENSOR_FAULTS = [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "no tensor 'model.layers.1.mlp.up_proj.weight'"),
    (lambda t: t.update(extra=np.ones(3, np.float32)), "unexpected tensor 'extra'"),
    (swap_shape, "'model.layers.1.mlp.up_proj.weight' has the shape [32, 64], and config.json makes it [64, 32]"),
    (as_integers, "'model.norm.weight' has elements of type I8"),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_FAULTS)
def test_faults_of_tensors_are_named(llama, change, message):
    rewrite(llama, change)
    with pytest.raises(CheckpointError) as fault:
        elm.from_hf(llama)
    assert message in str(fault.value) and str(fault.value).count("\n") < 2


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_shard(folder):
    shards(folder)[1].unlink()


def lose_tensor_of_a_shard(folder):
    index = folder / "model.safetensors.index.json"
    shards(folder)
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.ghost"] = listed["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(listed))


def pickle_alone(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


FOLDER_FAULTS = [
    (truncate, CheckpointError, "model.safetensors: truncated"),
    (lose_shard, CheckpointError, "this shard is missing"),
    (lose_tensor_of_a_shard, CheckpointError, "does not hold 'model.ghost'"),
    (pickle_alone, CheckpointError, "a pickle, which can run code"),
    (lambda folder: (folder / "model.safetensors").unlink(), CheckpointError, "no weights"),
    (lambda folder: (folder / "config.json").unlink(), CheckpointError, "no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), CheckpointError, "config.json: not valid JSON"),
    (lambda folder: edit(folder, model_type="lama"), ConfigError, "model_type 'lama' is not supported; did you mean"),
    (lambda folder: edit(folder, model_type=None), CheckpointError, "no key 'model_type'"),
    (lambda folder: edit(folder, hidden_act="mish"), ConfigError, "hidden_act: 'mish'"),
    (lambda folder: shutil.rmtree(folder), CheckpointError, "no such folder"),
]


@pytest.mark.parametrize(("spoil", "kind", "message"), FOLDER_FAULTS)
def test_faults_of_folders_are_named(llama, spoil, kind, message):
    spoil(llama)
    with pytest.raises(kind) as fault:
        elm.from_hf(llama)
    assert message in str(fault.value) and str(llama) in str(fault.value)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run directory made from an import, with a tokenizer."""
    model = elm.from_hf(GOLDENS / "qwen3")
    model.tokenizer = ByteTokenizer()
    return model.save(tmp_path_factory.mktemp("runs") / "small")


def test_run_to_folder_to_run_keeps_every_bit(small_run, tmp_path):
    first = elm.load(small_run)
    second = elm.load(elm.from_hf(first.to_hf(tmp_path / "hf")).save(tmp_path / "run"))
    assert first.loss(IDS) == second.loss(IDS)
    np.testing.assert_array_equal(first.logits(IDS), second.logits(IDS))
    assert second.tokenizer.end_of_text == 256 and second.config.model == first.config.model


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), SotuBPESpec().build()], ids=["bytes", "bpe"])
def test_tokenizers_travel_along(small_run, tmp_path, tokenizer):
    model = elm.load(small_run)
    model.tokenizer = tokenizer
    again = elm.from_hf(model.to_hf(tmp_path / "hf")).tokenizer
    text = "Fellow-citizens of 1790: “naïve” — 再见\n\tand on"
    np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    assert again.decode(again.encode(text)) == text
    assert (again.end_of_text, again.vocab_size) == (tokenizer.end_of_text, tokenizer.vocab_size)
    assert again.meanings() == tokenizer.meanings()


def test_companions_of_the_tokenizer_and_the_model_come_back(llama, tmp_path):
    for name, content in ByteTokenizer().published_files(begins=False).items():
        (llama / name).write_bytes(content)
    others = {"chat_template.jinja": "{{ messages }}", "special_tokens_map.json": "{}", "generation_config.json": "{}"}
    for name, content in others.items():
        (llama / name).write_text(content)
    elm.from_hf(llama).save(tmp_path / "run")
    folder = elm.load(tmp_path / "run").to_hf(tmp_path / "out")
    assert {name: (folder / name).read_text() for name in others} == others


def test_without_a_tokenizer_ids_work_and_text_says_why(llama):
    model = elm.from_hf(llama)
    assert model.logits(IDS).shape == (2, 30, 96)
    with pytest.raises(DataError, match="came without a tokenizer"):
        model.generate("hello")


def test_what_no_family_expresses_is_refused(tmp_path):
    model = elm.from_hf(GOLDENS / "llama")
    block = {"mixer": {"kind": "attention", "position": {"kind": "alibi"}}, "ffn": {"kind": "swiglu"}}
    odd = ModelSpec.model_validate({"width": 32, "vocab_size": 96, "blocks": {"layer": block}, "layout": ["layer"]})
    model.config = model.config.model_copy(update={"model": odd})
    with pytest.raises(ConfigError, match=r"no published family .*position is 'alibi'"):
        model.to_hf(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_or_left_half_written(llama, tmp_path, monkeypatch):
    model = elm.from_hf(llama)
    with pytest.raises(CheckpointError, match="already holds something"):
        model.to_hf(llama)
    with pytest.raises(ConfigError, match="unknown element type 'int8'"):
        model.to_hf(tmp_path / "out", dtype="int8")

    def fail(folder, tensors):
        (folder / "part-0.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hugging_face, "write_safetensors", fail)
    with pytest.raises(ResourceError, match="disk is full"):
        model.to_hf(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_dropout_is_announced(llama, caplog):
    edit(llama, attention_dropout=0.1)
    with caplog.at_level("INFO", logger="efficient_lm"):
        elm.from_hf(llama)
    assert "attention_dropout: dropout is not applied" in caplog.text


MEASURE = """
import sys
import jax, numpy as np
from efficient_lm.api import from_hf
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
jax.block_until_ready(jax.numpy.zeros(3))
from_hf(sys.argv[2])
before = peak()
model = from_hf(sys.argv[1])
size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
print((peak() - before) / size, size)
"""


@pytest.mark.slow
def test_peak_memory_of_an_import(tmp_path, llama):
    width, layers, vocab, hidden = 512, 6, 16000, 1536
    config = json.loads((llama / "config.json").read_text())
    config |= {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab}
    config |= {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_text(json.dumps(config))

    def tensors():
        def zeros(*shape):
            return np.zeros(shape, ml_dtypes.bfloat16)

        yield "model.embed_tokens.weight", zeros(vocab, width)
        yield "lm_head.weight", zeros(vocab, width)
        yield "model.norm.weight", zeros(width)
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            for name, rows in (("q", 512), ("k", 256), ("v", 256), ("o", 512)):
                yield f"{prefix}self_attn.{name}_proj.weight", zeros(rows, width)
            yield f"{prefix}mlp.gate_proj.weight", zeros(hidden, width)
            yield f"{prefix}mlp.up_proj.weight", zeros(hidden, width)
            yield f"{prefix}mlp.down_proj.weight", zeros(width, hidden)
            yield f"{prefix}input_layernorm.weight", zeros(width)
            yield f"{prefix}post_attention_layernorm.weight", zeros(width)

    write_safetensors(big, tensors(), 10**7)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(big), str(llama)], capture_output=True, text=True, check=True
    )
    share, size = map(float, done.stdout.split())
    assert size > 1.3e8
    assert share <= 1.2
