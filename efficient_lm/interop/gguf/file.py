"""A GGUF file opened as a Hugging Face folder: config, tensors, tokenizer files."""

from functools import cached_property
from typing import Any

from efficient_lm.interop.gguf.architectures import describe
from efficient_lm.interop.gguf.header import Header
from efficient_lm.interop.gguf.tensors import GGUFTensors
from efficient_lm.interop.gguf.tokenizer import tokenizer_files


class GGUFFile:
    """A model in a GGUF file.

    Attributes:
        config: what `config.json` would hold, as transformers 5 writes it.
        tensors: by Hugging Face name.
    """

    def __init__(self, header: Header):
        self._header = header
        self.config: dict[str, Any]
        self.config, stored = describe(header)
        self.tensors = GGUFTensors(header, stored)

    @cached_property
    def tokenizer(self) -> dict[str, bytes]:
        """File name → content: `tokenizer.json` and `tokenizer_config.json`; nothing where the file has no tokenizer.

        Raises:
            CheckpointError: a kind of tokenizer that is not supported, or a damaged one.
        """
        return tokenizer_files(self._header)
