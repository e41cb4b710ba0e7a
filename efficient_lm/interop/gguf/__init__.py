"""GGUF files, read as a Hugging Face folder would be: config, tensors and tokenizer files."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from efficient_lm.interop.gguf.file import GGUFFile


def open_gguf(path: str | Path) -> "GGUFFile":
    """Open a GGUF file; tensors are read when asked for.

    Raises:
        CheckpointError: not a GGUF file, truncated, of an architecture or with an option that is not supported, or
            metadata and tensors that do not agree.
    """
    # The package `gguf` takes half a second to import, which only those who open a file should spend.
    from efficient_lm.interop.gguf.file import GGUFFile
    from efficient_lm.interop.gguf.header import read_header

    return GGUFFile(read_header(path))
