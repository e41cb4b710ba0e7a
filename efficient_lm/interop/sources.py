"""Published models by path: a Hugging Face folder or a GGUF file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from efficient_lm.data.tokenizers import TOKENIZER_FILE, AbsentTokenizer, HuggingFaceTokenizer, Tokenizer
from efficient_lm.errors import CheckpointError
from efficient_lm.interop.gguf import open_gguf
from efficient_lm.interop.hugging_face import CONFIG, Description, describe, describe_folder, folder_tokenizer
from efficient_lm.runtime import cache_root
from efficient_lm.untrusted import refuse_pickle


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        described: its architecture, and where its tensors are.
        tokenizer: its own, or one that says it is absent.
        tokenizer_folder: where `tokenizer.json` is; for a GGUF file, a folder in the cache.
    """

    described: Description
    tokenizer: Tokenizer
    tokenizer_folder: Path

    @property
    def tokenizer_choice(self) -> dict[str, Any]:
        """The plain values of a tokenizer spec that gives this tokenizer."""
        if isinstance(self.tokenizer, AbsentTokenizer):
            return {"kind": "none"}
        return {"kind": "file", "path": str(self.tokenizer_folder.absolute())}

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for; None where it does not say."""
        stated = self.described.origin.config.get("max_position_embeddings")
        return self.described.spec.learned_positions or (stated if isinstance(stated, int) and stated > 0 else None)


def is_published(path: Path) -> bool:
    """Whether a path is a Hugging Face folder or a file, rather than a run directory."""
    return path.is_file() or ((path / CONFIG).is_file() and not (path / "config.yaml").is_file())


def open_published(path: Path, form: Literal["hf", "gguf"] | None = None) -> Published:
    """Everything but the tensors.

    Args:
        form: what it must be; None looks.

    Raises:
        CheckpointError: missing, damaged, or not of that form.
        ConfigError: a family or an option that is not supported.
    """
    if form == "gguf" or (form is None and path.is_file()):
        return _from_gguf(path)
    described = describe_folder(path)
    return Published(described, folder_tokenizer(path), path)


def _from_gguf(path: Path) -> Published:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    refuse_pickle(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: says nothing of the model; name its folder, with config.json")
    file = open_gguf(path)
    described = describe(file.config, file.tensors, {}, str(path))
    if TOKENIZER_FILE not in file.tokenizer:
        return Published(described, AbsentTokenizer(), path)
    folder = _kept(file.tokenizer)
    return Published(described, HuggingFaceTokenizer.read(folder / TOKENIZER_FILE), folder)


def _kept(files: dict[str, bytes]) -> Path:
    """A folder in the cache with these files: a run that uses the tokenizer names it by its path."""
    digest = hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()[:20]
    folder = cache_root() / "tokenizers" / digest
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            (folder / name).write_bytes(content)
    return folder
