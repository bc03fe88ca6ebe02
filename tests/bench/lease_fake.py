"""Speaks as a worker of the lease does, and imports nothing.

FAULT: "hang NAME" or "die NAME", so does the item NAME; "cpu", it sees no GPU.
"""

import json
import os
import signal
import sys
import time

COLUMNS = {"device": "GPU", "driver": "1", "torch": "2", "triton": "3", "code": "a"}
COLUMNS |= {"timm": "", "transformers": "", "diffusers": ""}
fault, _, which = os.environ.get("FAULT", "").partition(" ")


def say(**message):
    print(json.dumps(message), flush=True)


for line in sys.stdin:
    job = json.loads(line)
    if "columns" in job:
        say(kind="columns", columns=COLUMNS, gpu=fault != "cpu")
        continue
    for item in job["items"]:
        name = item["name"]
        say(kind="begin", item=name)
        row = {"suite": "lease", "case": name, "contender": "who", "measure": "latency"}
        say(kind="row", item=name, row={**row, "value": 1.0})
        if name == which:
            if fault == "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(600)
        say(kind="end", item=name, end="ok", seconds=0.1)
    say(kind="idle")
