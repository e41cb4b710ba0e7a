"""How byte-level vocabularies cut text into words, by the name a GGUF file gives (`tokenizer.ggml.pre`).

The names are llama.cpp's; the expressions are those of the tokenizers the names stand for.
"""

from dataclasses import dataclass
from typing import Any

Piece = dict[str, Any]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DIGITS: Piece = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting text.

    Attributes:
        splits: expressions, each cutting what the ones before have left whole.
        digits: whether digits stand alone before anything else is cut.
        words: whether words are those of GPT-2.
        whole_words: whether a word that is in the vocabulary is taken without merging.
        adds_bos: whether a beginning token is put first where the file does not say.
        composed: whether text is brought to the composed form of Unicode first (NFC).
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    words: bool = False
    whole_words: bool = False
    adds_bos: bool = False
    composed: bool = False

    def pre_tokenizer(self) -> Piece:
        """As `tokenizer.json` writes it."""
        isolated = {"behavior": "Isolated", "invert": False}
        pieces = [_DIGITS] if self.digits else []
        pieces += [{"type": "Split", "pattern": {"Regex": split}, **isolated} for split in self.splits]
        pieces.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.words})
        return pieces[0] if len(pieces) == 1 else {"type": "Sequence", "pretokenizers": pieces}

    def normalizer(self) -> Piece | None:
        """As `tokenizer.json` writes it."""
        return {"type": "NFC"} if self.composed else None


_LLAMA_BPE = PreTokenizer((_LLAMA3,), whole_words=True, adds_bos=True)
_GPT_2 = PreTokenizer(words=True)
_STARCODER = PreTokenizer(digits=True, words=True)

PRE_TOKENIZERS = {
    "default": PreTokenizer(_DEFAULT),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "dbrx": PreTokenizer((_LLAMA3,)),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2": PreTokenizer((_QWEN2,), composed=True),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, adds_bos=True),
    "gpt-2": _GPT_2,
    "phi-2": _GPT_2,
    "olmo": PreTokenizer(words=True, composed=True),
    "mpt": PreTokenizer(words=True, composed=True),
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,
    "command-r": PreTokenizer(digits=True, words=True, composed=True),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
}
"""`tokenizer.ggml.pre` → how text is cut."""
