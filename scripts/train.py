"""The same as ``efficient-lm train``."""

import sys

from efficient_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
