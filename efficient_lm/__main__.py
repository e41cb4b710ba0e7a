"""``python -m efficient_lm`` is the command ``efficient-lm``."""

import sys

from efficient_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
