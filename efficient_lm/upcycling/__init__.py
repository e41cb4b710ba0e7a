"""What is done around a checkpoint: experts made of dense layers, merged, and dropped; mixture of depths around layers.

The methods that make them are one file each; every file of this folder is imported.
"""

from efficient_lm.spec import load_kinds

load_kinds(__name__, __path__)
