"""The same as ``efficient-lm evaluate``."""

import sys

from efficient_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
