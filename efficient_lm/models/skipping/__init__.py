"""Policies of inference, one file each: which halves of which layers a token runs. Every file here is imported."""

from efficient_lm.spec import load_kinds

load_kinds(__name__, __path__)
