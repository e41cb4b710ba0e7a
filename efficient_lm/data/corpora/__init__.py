"""Embedded text and tokenizer; README.md beside them says where they come from."""

from pathlib import Path

CORPORA = Path(__file__).parent
