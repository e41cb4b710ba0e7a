"""Where runs are started, a file each."""

from efficient_lm.spec import load_kinds

load_kinds(__name__, __path__)
