"""Several residual streams beside each other, one kind a file. Every file of this folder is imported."""

from efficient_lm.spec import load_kinds

load_kinds(__name__, __path__)
