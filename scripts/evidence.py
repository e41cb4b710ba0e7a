"""``python scripts/evidence.py NAME [key=value ...]``: measures what `configs/evidence/NAME.yaml` asks."""

import sys

from efficient_lm.cli.main import guarded
from efficient_lm.runtime import configure_logging, keep_compiled_programs


def run() -> int:
    keep_compiled_programs()
    configure_logging()
    from efficient_lm.evidence.gather import gather

    return 0 if gather(sys.argv[1] if sys.argv[1:] else "", sys.argv[2:]) else 1


if __name__ == "__main__":
    sys.exit(guarded(run))
