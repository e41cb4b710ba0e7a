"""The embedded files: what their README says they are, and that the script makes them again."""

import hashlib
import importlib.util
import json

import pytest

from efficient_lm.data.corpora import CORPORA
from efficient_lm.data.sources import SotuSource, read_documents


@pytest.fixture
def script(request):
    path = request.config.rootpath / "scripts" / "prepare_sotu.py"
    specification = importlib.util.spec_from_file_location("prepare_sotu", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["sotu.jsonl.xz", "sotu_bpe.json"])
def test_readme_names_the_bytes_that_are_here(name):
    content = (CORPORA / name).read_bytes()
    line = next(line for line in (CORPORA / "README.md").read_text().splitlines() if line.startswith(f"| `{name}`"))
    assert hashlib.sha256(content).hexdigest() in line and f"{len(content):,} bytes" in line


def test_outgoing_president_comes_first(script, tmp_path):
    (tmp_path / "data").mkdir()
    for year, president in [(1952, "Zed"), (1953, "Zed"), (1953, "Abe"), (1954, "Abe")]:
        record = {"year": year, "name": president, "party": "none", "text": f"{president} — {year}"}
        (tmp_path / "data" / f"{year}_{president}.json").write_text(json.dumps(record))
    addresses = script.read_addresses(tmp_path)
    assert [address["name"] for address in addresses] == ["1952_Zed", "1953_Zed", "1953_Abe", "1954_Abe"]
    script.write_corpus(addresses, tmp_path / "a.jsonl.xz")
    script.write_corpus(addresses, tmp_path / "b.jsonl.xz")
    assert (tmp_path / "a.jsonl.xz").read_bytes() == (tmp_path / "b.jsonl.xz").read_bytes()
    assert list(read_documents(tmp_path / "a.jsonl.xz", "text")) == [address["text"] for address in addresses]
    with pytest.raises(SystemExit, match="give the unpacked folder"):
        script.read_addresses(tmp_path / "data")


@pytest.mark.slow
def test_training_the_tokenizer_again_gives_the_same_file(script, tmp_path):
    training = [text for i, text in enumerate(SotuSource().documents()) if i % 20 != 19]
    script.train_tokenizer(training).save(str(tmp_path / "again.json"), pretty=False)
    assert (tmp_path / "again.json").read_bytes() == (CORPORA / "sotu_bpe.json").read_bytes()
