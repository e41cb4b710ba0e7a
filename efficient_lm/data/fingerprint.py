"""Whether data is the same, and in the same order, as it was."""

import hashlib
import json

from efficient_lm.data.base import Data

ROWS = 8
"""Rows of the endless sequence that are looked at: they come from everywhere in data that is shuffled."""


def fingerprint(data: Data) -> str:
    """32 hexadecimal digits of how much there is to train on and of the first rows, in order.

    It does not depend on where files are, on the batch size, or on processes; it does on the documents, the tokenizer,
    the length of rows, how they are packed, and the seed.
    """
    counts = {name: count for name, count in data.summary().items() if not name.startswith("validation")}
    digest = hashlib.sha256(json.dumps(counts, sort_keys=True).encode())
    batches = data.train_batches(ROWS)
    try:
        rows = next(batches)
    finally:
        batches.close()
    for name in ("tokens", "targets", "segment_ids"):
        digest.update(rows[name].tobytes())
    return digest.hexdigest()[:32]
