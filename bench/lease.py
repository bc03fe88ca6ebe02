"""`python -m t5fx.bench.lease`: the short name of `gpu.lease`."""

import sys

from .gpu.lease.__main__ import main, process_age

if __name__ == "__main__":
    sys.exit(main(age=process_age()))
