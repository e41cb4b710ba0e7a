"""GGUF files, read as a Hugging Face folder would be: config, tensors and tokenizer files."""

from efficient_lm.interop.gguf.file import GGUFFile, open_gguf

__all__ = ["GGUFFile", "open_gguf"]
