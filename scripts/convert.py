"""The same as ``efficient-lm convert``."""

import sys

from efficient_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
