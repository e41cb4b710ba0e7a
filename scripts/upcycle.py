"""The same as ``efficient-lm upcycle``."""

import sys

from efficient_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["upcycle", *sys.argv[1:]]))
