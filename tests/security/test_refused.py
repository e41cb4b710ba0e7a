"""Malicious files through the verbs and the Python interface: refused in a line, nothing executed, nothing left."""

import io
import itertools
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import efficient_lm as elm
from efficient_lm.errors import CheckpointError, ConfigError, DataError, UserError
from efficient_lm.interop.tensors import SafetensorsFolder

INDEX = "model.safetensors.index.json"


VERBS = itertools.cycle([
    ["convert", "source={0}", "output={1}"], ["evaluate", "checkpoint={0}", "data=sotu"],
    ["train", "init_from={0}", "run.dir={1}", "train.steps=1"], ["generate", "checkpoint={0}", "prompt=a"],
])  # fmt: skip
"""What reads a model; each malicious file goes through the next of them."""


def refusal(run, source, status):
    """What a verb says of a model that it and the Python interface refuse alike, leaving nothing."""
    out = Path(source).parent / "out"
    arguments = [argument.format(source, out) for argument in next(VERBS)]
    found, _, message = run(*arguments)
    assert (found, len(message.splitlines())) == (status, 1), f"{arguments[0]}: {message}"
    with pytest.raises({2: ConfigError, 3: DataError, 4: CheckpointError}[status]):
        elm.load(source)
    assert not out.exists()
    return message


def torch_archive(payload):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    return content.getvalue()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "consolidated.00.pth", "model.safetensors"])
def test_pickles_in_a_folder_are_refused_by_a_name_for_what_is_safe(run, published, payload, canary, name):
    (published / "model.safetensors").unlink()
    (published / name).write_bytes(torch_archive(payload))
    assert "a pickle, which can run code when it is read: refused; save the model once more" in refusal(
        run, published, 4
    )
    assert not canary.exists()


@pytest.mark.parametrize("name", ["model.pt", "model.pkl", "model.gguf"])
def test_pickles_by_themselves_are_refused(run, tmp_path, payload, canary, name):
    (tmp_path / name).write_bytes(payload)
    assert "as safetensors" in refusal(run, tmp_path / name, 4)
    for read in (elm.from_hf, elm.from_gguf):
        with pytest.raises(UserError):
            read(tmp_path / name)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/hosts", "b/a.safetensors", "..", ".", "a\\b", "a\0b"])
def test_shards_are_files_of_the_folder(run, published, name):
    (published.parent / "stolen.safetensors").write_bytes((published / "model.safetensors").read_bytes())
    (published / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "is no name of a file beside it; paths are not followed" in refusal(run, published, 4)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_links_out_of_the_folder_are_not_followed(run, published, name):
    outside = (published / name).rename(published.parent / f"private_{name}")
    (published / name).symlink_to(outside)
    assert "a link that leads out of its folder" in refusal(run, published, 3 if name.startswith("tokenizer") else 4)


def test_a_snapshot_of_hugging_faces_cache_is_all_links(published):
    snapshot = published.parent / "models--a--b" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in published.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert elm.from_hf(snapshot).config.model.width == 32


def test_code_beside_a_model_is_never_run(published, canary):
    stated = json.loads((published / "config.json").read_text())
    stated["auto_map"] = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}
    (published / "config.json").write_text(json.dumps(stated))
    (published / "modeling.py").write_text(f"open({str(canary)!r}, 'w')\n")
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    beside = json.loads((published / "tokenizer_config.json").read_text())
    beside |= {"chat_template": template, "auto_map": {"AutoTokenizer": ["modeling.Tokenizer", None]}}
    (published / "tokenizer_config.json").write_text(json.dumps(beside))
    out = elm.from_hf(published).to_hf(published.parent / "out")
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not (out / "modeling.py").exists() and not canary.exists()


def edited(folder, old, new):
    config = (folder / "config.yaml").read_text()
    assert old in config
    (folder / "config.yaml").write_text(config.replace(old, new, 1))


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ("seed: !!python/object/apply:pathlib.Path.touch [CANARY]", "the tag '!!python/object/apply:pathlib.Path.t"),
        ("seed: !!python/name:os.system", "tags are refused, for they can run code"),
        ("seed: !include /etc/passwd", "the tag '!include'"),
        ("seed: 0\n  _target_: os.system", "run._target_: a Python path, which is never followed"),
        ("seed: 0\n  a: &a [1,1]\n  b: [*a,*a]", "an alias"),
        ("seed: 0\n  seed: 1", "'seed' comes twice"),
        ("seed: " + "[" * 3000, "nested too deeply"),
        ("seed: 0\n  a: " + "x" * (1 << 20), "larger than 1,048,576 bytes"),
    ],
)
def test_a_runs_config_is_data(run, downloaded, canary, new, said):
    edited(downloaded, "seed: 0", new.replace("CANARY", str(canary)))
    assert said in refusal(run, downloaded, 4)
    assert not canary.exists()


def test_interpolations_of_a_downloaded_config_stay_text(run, downloaded, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hf_planted_value")
    edited(downloaded, "name: llama", "name: ${oc.env:SECRET_TOKEN}")
    assert elm.load(downloaded).config.run.name == "${oc.env:SECRET_TOKEN}"
    for old in ("  blocks:\n    layer:", "  layout:\n  - layer"):
        edited(downloaded, old, old.replace("layer", "${oc.env:SECRET_TOKEN}"))
    out = downloaded.parent / "out"
    status, printed, said = run("train", f"init_from={downloaded}", f"run.dir={out}", "train.steps=1")
    assert status == 2 and "would be an interpolation; it is not resolved" in said
    saved = elm.load(downloaded).save(out)
    for text in (printed, said, *(file.read_text(errors="replace") for file in saved.rglob("*") if file.is_file())):
        assert "hf_planted_value" not in text


def header(entries, size=64, length=0):
    text = json.dumps(entries).encode().ljust(length)
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.mark.parametrize("length", [0x280, 0x480])
def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path, length):
    entries = {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}
    (tmp_path / "model.safetensors").write_bytes(header(entries, length=length))
    assert SafetensorsFolder(tmp_path).read("a").tolist() == [0.0] * 16


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 1 << 24) + b"{}", b"", b"\0" * 7,
        header([]), header({"a": 1}), header({"a": {"dtype": "F32", "shape": [4]}}),
        header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        header({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
                "b": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}),
        header({"a": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}}),
        header({"a": {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}}),
        struct.pack("<Q", 200_000) + b"[" * 200_000 + bytes(64),
    ],
)  # fmt: skip
def test_headers_of_safetensors_that_lie(run, published, content):
    (published / "model.safetensors").write_bytes(content)
    assert "model.safetensors: truncated or not safetensors" in refusal(run, published, 4)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers: 1,000,000,000 is more than 4,096"),
        ("hidden_size", 1 << 30, ""),
        ("vocab_size", 1 << 40, "parameters, and the files hold 24,736"),
        ("intermediate_size", 1 << 40, "parameters, and the files hold 24,736"),
        ("model_type", "os.system", "model_type 'os.system' is not supported"),
        ("_name_or_path", {"deep": 1}, None),
    ],
)
def test_sizes_that_a_config_states_are_compared_with_the_files(run, published, key, value, said):
    stated = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(stated | {key: value}))
    if said is None:
        elm.load(published)
        return
    with pytest.raises((CheckpointError, ConfigError), match=None) as error:
        elm.load(published)
    assert said in str(error.value)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda d: d["model"]["vocab"].update({"a": 4_000_000_000}), "a vocabulary of 4,000,000,001 ids"),
    (lambda d: d.update(added_tokens=[{"id": 1 << 31, "content": "z", "special": True}]), "tokenizer.json"),
    (lambda d: d.clear(), "is not a valid tokenizer.json"),
])  # fmt: skip
def test_tokenizers_that_lie(run, published, spoil, said):
    described = json.loads((published / "tokenizer.json").read_text())
    spoil(described)
    (published / "tokenizer.json").write_text(json.dumps(described))
    assert said in refusal(run, published, 3)
    (published / "tokenizer.json").write_text('{"a":' + "[" * 100_000)
    assert "nested too deeply" in refusal(run, published, 3)


def gguf(keys=0, tensors=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize("content", [
    gguf(keys=1 << 60), gguf(tensors=1 << 60), gguf(1, 0, struct.pack("<Q", 1 << 60)),
    gguf(1, 0, text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 60)),
    gguf(1, 0, text(b"a") + struct.pack("<IIQ", 9, 9, 1 << 60)),
    gguf(1, 0, text(b"a") + struct.pack("<I", 99)),
    gguf(0, 1, text(b"t") + struct.pack("<IQQQQIQ", 4, 1 << 62, 1 << 62, 1 << 62, 1 << 62, 0, 0)),
    gguf(0, 1, text(b"t") + struct.pack("<IQIQ", 1, 64, 0, 1 << 62)),
    gguf(0, 1, text(b"t") + struct.pack("<I", 1 << 30)),
])  # fmt: skip
def test_headers_of_gguf_that_lie(run, tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert "model.gguf: " in refusal(run, path, 4)
    with pytest.raises(CheckpointError):
        elm.from_gguf(path)


def test_a_sparse_gguf_of_many_gigabytes_is_refused_by_its_header(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(1, 0, text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 32)))
    os.truncate(path, 1 << 36)
    with pytest.raises(CheckpointError, match="goes beyond the 67,108,864 bytes that headers have"):
        elm.from_gguf(path)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "/x", "a\\b"])
def test_the_name_of_a_run_is_no_path(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    status, _, said = run("train", f"run.name='{name}'", "train.steps=1")
    assert status == 2 and "run.name: " in said and list(tmp_path.iterdir()) == []


def test_links_and_devices_in_a_run_are_not_copied_out_of_it(downloaded):
    secret = downloaded.parent / "id_rsa"
    secret.write_text("planted")
    (downloaded / "hugging_face" / "notes.txt").symlink_to(secret)
    out = elm.load(downloaded).to_hf(downloaded.parent / "out")
    assert not (out / "notes.txt").exists()
    (downloaded / "hugging_face" / "generation_config.json").unlink(missing_ok=True)
    (downloaded / "hugging_face" / "generation_config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link that leads out of its folder"):
        elm.load(downloaded)


def test_what_was_read_is_never_written_over(run, published, downloaded):
    files = [file for folder in (published, downloaded) for file in folder.rglob("*") if file.is_file()]
    before = {file: file.read_bytes() for file in files}
    for source, output in ((published, published), (published, downloaded), (downloaded, published)):
        status, _, said = run("convert", f"source={source}", f"output={output}")
        assert status == 4 and "already holds something" in said
    assert before == {file: file.read_bytes() for file in before}


def test_arrays_of_python_objects_are_not_read(published, payload, canary):
    pickled = io.BytesIO()
    np.save(pickled, np.array([1, None], object), allow_pickle=True)
    (published / "model.safetensors").write_bytes(pickled.getvalue())
    with pytest.raises(CheckpointError):
        elm.load(published)
    (published / "model.safetensors").write_bytes(save({"model.norm.weight": np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError):
        elm.load(published)
