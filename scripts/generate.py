"""The same as ``efficient-lm generate``."""

import sys

from efficient_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
