"""Small files that expand to gigabytes are refused in little memory."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import textwrap

import pyarrow
import tensorstore

from efficient_lm.training import manifests

SPARE = 800 << 20
"""Bytes of memory that reading any of them may take beyond what the imports did; each expands to a gibibyte or more."""

READ = f"""
import resource, sys
import jax
import efficient_lm as elm
from efficient_lm.data.dataset import TextDataSpec
from efficient_lm.data.sources import FilesSource
from efficient_lm.errors import UserError
jax.numpy.zeros(3).block_until_ready()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {SPARE}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    try:
        text = path.endswith((".gz", ".xz", ".zst"))
        print(sum(map(len, FilesSource(paths=(path,)).documents())) if text else elm.load(path))
    except UserError as error:
        print(f"{{type(error).__name__}}: {{error}}")
"""


def written(path, content):
    path.write_bytes(content)
    return path


def with_huge_chunks(run):
    """A run whose checkpoint says that one of its arrays lies in chunks of two gigabytes, with a manifest to match."""
    step = next(folder for folder in (run / "checkpoints").iterdir() if folder.name.isdigit())
    base = {"driver": "file", "path": f"{step / 'parameters'}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    key = next(key for key in store.list().result() if key.endswith(b"zarr.json"))
    described = json.loads(store.read(key).result().value)
    described["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 29] + [1] * (len(described["shape"]) - 1)
    described["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    store.write(key, json.dumps(described)).result()
    (step / manifests.NAME).unlink(missing_ok=True)
    manifests.write_manifest(step)
    return run


def test_bombs_are_refused_in_little_memory(tmp_path, downloaded, published):
    zeros = bytes(1 << 24)
    with pyarrow.CompressedOutputStream(str(tmp_path / "c.txt.zst"), "zstd") as stream:
        for _ in range(64):
            stream.write(zeros)
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"intermediate_size": 1 << 33}))
    paths = [
        written(tmp_path / "a.txt.gz", gzip.compress(zeros) * 64),
        written(tmp_path / "b.jsonl.xz", lzma.compress(zeros) * 64),
        tmp_path / "c.txt.zst",
        published,
        with_huge_chunks(downloaded),
    ]
    command = [sys.executable, "-c", textwrap.dedent(READ), *map(str, paths)]
    # One heap for all threads: each of its own would reserve 64 MiB of addresses, which the limit counts.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
    *texts, folder, run = done.stdout.splitlines()
    assert len(texts) == 3
    for path, line in zip(paths, texts, strict=False):
        assert line == f"DataError: '{path}' expands to over 256 times its size, which no text does; it is not read"
    assert run.startswith("CheckpointError: ") and "says that its chunks have" in run
    assert folder.startswith("CheckpointError: ") and "and the files hold 24,736" in folder
