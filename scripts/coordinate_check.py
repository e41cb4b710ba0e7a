"""The same as ``efficient-lm coordinate_check``."""

import sys

from efficient_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["coordinate_check", *sys.argv[1:]]))
