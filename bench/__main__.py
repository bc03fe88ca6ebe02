"""`python -m bench` from a checkout, `python -m t5fx.bench` anywhere: the same as `t5fx bench`."""

import sys

from t5fx_command import main

sys.exit(main(["bench", *sys.argv[1:]]))
