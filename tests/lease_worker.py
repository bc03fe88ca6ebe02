"""A worker of the lease with faults in it, for tests/test_lease.py: FAULT says which.

"wrong NAME": the tensor NAME of every comparison is far off. "hang NAME", "die NAME": so does the
item NAME. Anything else: nothing.
"""

import dataclasses
import os
import signal
import sys
import time

from t5fx.bench.lease import exactness, worker

fault, _, which = os.environ.get("FAULT", "").partition(" ")
compared, run = exactness.compared, worker.run


def wrong(context, case, **how):
    found = compared(context, case, **how)
    if fault != "wrong" or which not in found.errors:
        return found
    errors = found.errors | {which: (1.0, found.errors[which][1])}
    return dataclasses.replace(found, errors=errors, first_wrong=which)


def faulty(item, context, say):
    if fault in ("hang", "die") and item["name"] == which:
        say(kind="begin", item=item["name"])
        if fault == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(600)
    return run(item, context, say)


exactness.compared, worker.run = wrong, faulty
sys.exit(worker.main())
