"""Runs the plan on a lease: steps in their order, kernels compiled beside them."""

from __future__ import annotations

import sys
import time

from rich.console import Console

from .. import assembler
from . import summary
from .lease import MACHINE, Lease, Options
from .plan import Item, compiling, plan
from .pool import Pool

COMPILE_SECONDS = 45.0


def run(options: Options, console: Console, begun: float | None = None) -> int:
    """The exit code: 0, or 1 where something was wrong.

    begun: when the clock started (`time.monotonic`), if not now.
    """
    lease = Lease(options, console, **({} if begun is None else {"begun": begun}))
    pool: Pool | None = None
    try:
        lease.records.start(lease.columns(), arguments=sys.argv[1:])
        lease.step(MACHINE)
        capability = int(lease.architecture().removeprefix("sm_"))
        lease.own = assembler.own(capability)
        lease.newer = assembler.newest(options.ptxas, capability)
        lease.chosen = lease.own
        lease.prepare(lease.environment(lease.own))
        steps = plan(options.rehearse)
        if options.steps:
            steps = [step for step in steps if step.name in options.steps]
        if any(lease.pending(step) for step in steps if step.name not in ("ncu", "sanitizer")):
            pool = Pool(lease, _to_compile(lease))
            pool.start()
            if any(lease.pending(step) for step in steps if step.name.startswith("parity")):
                pool.wait(time.monotonic() + lease.allowed(COMPILE_SECONDS))
        for step in steps:
            if step.name == "widths":
                lease.choose()
            if step.name == "model" and pool is not None:
                pool.stop()
            lease.step(step)
            lease.summarise()
    finally:
        if pool is not None:
            pool.stop()
        lease.close()
    return 1 if summary.wrong(lease.records) else 0


def _to_compile(lease: Lease) -> list[list[tuple[str, Item]]]:
    groups = compiling(lease.options.rehearse, lease.architecture())
    at_hand = lease.assemblers()
    return [[(a, item) for a, item in group if a in at_hand] for group in groups]
