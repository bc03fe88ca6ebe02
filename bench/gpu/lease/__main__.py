"""Everything that a first borrowed GPU should say, in ten minutes: python -m t5fx.bench.lease

Each result is a line of DIR/rows.jsonl, on disk before the next one begins; DIR/summary.txt says
the most important ones. Called again, it takes up what failed or was not reached, then what needs
more time. `t5fx bench report DIR/rows.jsonl` renders it. Exit code: 0, or 1 where something was
wrong, 2 where nothing could be run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from t5fx.errors import T5Error

from .lease import Options
from .run import run


def main(arguments: Sequence[str] | None = None, age: float = 0.0) -> int:
    """Run the plan. age: seconds that the lease's own process has taken already."""
    begun = time.monotonic() - age
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _ended)  # what cuts a lease off may ask first
    console = Console(soft_wrap=True)
    try:
        return run(
            Options(
                out=options.out,
                seconds=options.seconds,
                rehearse=options.rehearse or "",
                ptxas=options.ptxas,
                steps=tuple(options.steps or ()),
            ),
            console,
            begun,
        )
    except T5Error as error:
        console.print(f"lease: {error}", style="red", markup=False, highlight=False)
        return 2


def process_age() -> float:
    """Seconds since this process began; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks)
    except (OSError, ValueError, AttributeError, IndexError):
        return 0.0


def _ended(*_: Any) -> None:
    raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m t5fx.bench.lease",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results")
    parser.add_argument("--seconds", type=float, default=570, help="for all (default: 570)")
    parser.add_argument("--ptxas", metavar="PATH", help="an assembler to hold against Triton's own")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="these alone")
    parser.add_argument(
        "--rehearse",
        nargs="?",
        const="full",
        choices=("full", "tiny"),
        help="on a CPU, in Triton's interpreter, sizes small and times stubbed; tiny: the least",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(age=process_age()))
