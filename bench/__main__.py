"""`python -m bench` from a checkout, `python -m t5fx.bench` anywhere: the same as `t5fx bench`."""

import sys

from t5fx.__main__ import main

sys.exit(main(["bench", *sys.argv[1:]]))
