"""What the arrays of a checkpoint say of their chunks: none may be larger than the array it is a part of.

Reading an array takes whole chunks into memory, and a chunk of zeros takes a few bytes on disk: a checkpoint of some
kilobytes could ask for any amount of memory. How far one chunk expands, TensorStore itself bounds by its stated shape.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore

DATABASE = "manifest.ocdbt"
DESCRIPTIONS = (".zarray", "zarr.json")
DESCRIPTION_BYTES = 1 << 20


def oversized(item: Path) -> str | None:
    """Which array of an item of a checkpoint has chunks larger than itself, and how large; None if all is well.

    Raises:
        ValueError: a description that cannot be read.
    """
    for name, content in _descriptions(item):
        if len(content) > DESCRIPTION_BYTES:
            return f"{name} has {len(content):,} bytes"
        described = json.loads(content)
        whole = math.prod(max(size, 1) for size in described["shape"])
        largest = max(map(math.prod, _chunk_shapes(described)), default=0)
        if largest > whole:
            return f"{name} says that its chunks have {largest:,} values, and the array {whole:,}"
    return None


def _descriptions(item: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of what describes each array: in the item's database, or in files of their own."""
    if (item / DATABASE).is_file():
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}).result()
        for key in store.list().result():
            name = key.decode(errors="replace")
            if name.endswith(DESCRIPTIONS):
                yield name, store.read(key).result().value
        return
    for file in (found for name in DESCRIPTIONS for found in item.rglob(name)):
        with file.open("rb") as opened:
            yield str(file.relative_to(item)), opened.read(DESCRIPTION_BYTES + 1)


def _chunk_shapes(described: Any) -> Iterator[list[int]]:
    """Of a description, the shapes of chunks wherever they are stated."""
    if isinstance(described, dict):
        for name, value in described.items():
            if name in ("chunks", "chunk_shape") and isinstance(value, list):
                yield value
            else:
                yield from _chunk_shapes(value)
    elif isinstance(described, list):
        for value in described:
            yield from _chunk_shapes(value)
