"""What is measured of a trained run, one file each. Every file here is imported."""

from efficient_lm.spec import load_kinds

load_kinds(__name__, __path__)
