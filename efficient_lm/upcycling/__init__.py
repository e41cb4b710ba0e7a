"""What is done with experts around a checkpoint: made of dense layers, merged, and dropped.

The methods that make them are one file each; every file of this folder is imported.
"""

from efficient_lm.spec import load_kinds

load_kinds(__name__, __path__)
