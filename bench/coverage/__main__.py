"""`python -m t5fx.bench.coverage`."""

from .suite import main

main()
