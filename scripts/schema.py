"""The same as ``efficient-lm schema``."""

import sys

from efficient_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["schema", *sys.argv[1:]]))
