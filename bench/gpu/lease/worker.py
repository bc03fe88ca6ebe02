"""A process of the lease: runs the items of a step one by one and says what each gave.

It reads a job a line and writes a message a line. What libraries print goes to the log.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from t5fx.errors import T5Error

from ...harness.records import columns_of
from ...harness.results import Row, here
from .child import end_with_parent

#: What torch's and Triton's errors of a CUDA context say.
LOST = ("CUDA error", "Triton Error [CUDA]", "AcceleratorError", "CUDNN_STATUS", "CUBLAS_STATUS")


@dataclass(frozen=True)
class Context:
    """What an item is told.

    rehearse: on a CPU, in Triton's interpreter, nothing timed. tiny: nothing compiled either.
    facts: of the run: "out" (the folder), "costliest" (kernels), "assemblers".
    """

    rehearse: bool = False
    tiny: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")


def main() -> int:
    out = _own_output()
    end_with_parent()
    torch.manual_seed(0)

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    for line in sys.stdin:
        job = json.loads(line)
        if "columns" in job:
            say(kind="columns", columns=here(), gpu=torch.cuda.is_available())
            continue
        context = Context(**job["context"])
        with _surroundings(context):
            for item in job["items"]:
                if not run(item, context, say):
                    return 3
        say(kind="idle")
    return 0


def run(item: dict[str, Any], context: Context, say: Any) -> bool:
    """Run an item; whether this process is fit for another."""
    say(kind="begin", item=item["name"])
    start = time.perf_counter()
    end, fit = "ok", True
    try:
        for row in _rows(item, context):
            say(kind="row", item=item["name"], row=columns_of(row))
            if row.status in ("refused", "failed"):
                end = row.status
            fit = fit and not is_lost(row.detail)
        if not context.rehearse and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what went wrong meanwhile is this item's
    except Exception as error:
        traceback.print_exc()
        detail = f"{type(error).__name__}: {error}".strip().partition("\n")[0][:500]
        end = "refused" if isinstance(error, T5Error) else "failed"
        if isinstance(error, ModuleNotFoundError):
            end, detail = "absent", f"needs {error.name}"
        fit = not is_lost(detail)
        about = {"suite": "lease", "case": item["name"], "tokens": 0, "batch": 1}
        row = Row(**about, dtype="", mode="", contender="", measure="", status=end, detail=detail)
        say(kind="row", item=item["name"], row=columns_of(row))
    say(kind="end", item=item["name"], end=end, seconds=time.perf_counter() - start)
    if fit and not context.rehearse and torch.cuda.is_initialized():
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return fit


def _rows(item: dict[str, Any], context: Context) -> Iterator[Row]:
    module, _, function = item["run"].rpartition(".")
    found = importlib.import_module(f".{module}", __package__)
    yield from getattr(found, function)(context, item["name"], **item["arguments"])


def is_lost(detail: str) -> bool:
    """Whether an error may leave no CUDA context to go on with."""
    return any(sign in detail for sign in LOST)


@contextlib.contextmanager
def _surroundings(context: Context) -> Iterator[None]:
    """For a rehearsal the mended interpreter, where this process is one."""
    if context.rehearse and os.environ.get("TRITON_INTERPRET") == "1":
        from ..interpreter import mended

        with mended():
            yield
    else:
        yield


def _own_output() -> IO[str]:
    """Standard output for messages alone; what anyone else prints goes to standard error."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


if __name__ == "__main__":
    sys.exit(main())
