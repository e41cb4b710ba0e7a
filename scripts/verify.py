"""The same as ``efficient-lm verify``."""

import sys

from efficient_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
