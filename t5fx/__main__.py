"""`python -m t5fx` is the command `t5fx`."""

import sys

from t5fx_command import main

if __name__ == "__main__":
    sys.exit(main())
