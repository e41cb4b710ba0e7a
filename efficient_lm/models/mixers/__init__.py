"""Sequence mixers, one file each. Every file of this folder is imported, so that its kinds are known."""

from efficient_lm.spec import load_kinds

load_kinds(__name__, __path__)
