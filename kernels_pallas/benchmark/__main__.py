"""`efficient-lm benchmark` where nothing but JAX is installed: python -m kernels_pallas.benchmark --help."""

import argparse
import sys

from kernels_pallas.benchmark import session
from kernels_pallas.benchmark.cases import SETS
from kernels_pallas.benchmark.peers import PEERS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.benchmark")
    parser.add_argument("--op", choices=session.OPERATORS, help="all of them if it is not given")
    parser.add_argument("--tune", choices=session.OPERATORS, help="find its block sizes instead")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[name for name in PEERS if name != "reference"])
    parser.add_argument("--shapes", choices=SETS, default="models")
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--passes", nargs="+", choices=session.PASSES, default=session.PASSES)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", help="a folder, such as benchmarks/results")
    options = vars(parser.parse_args())
    try:
        session.run(options.pop("op"), options.pop("tune"), **options)
    except session.Unfit as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
