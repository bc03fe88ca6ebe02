"""NVIDIA's own tools over the kernels, each with a process of its own to watch.

Where one is not installed, or is refused by the machine, its row says "unavailable" and why.
"""

from __future__ import annotations

import csv
import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from t5fx.kernels.triton_kernels import configs

from ...harness.results import Experiment, Row
from .machine import _none
from .plan import ALONE
from .worker import Context

#: Where the tools are, where they are not on the PATH.
PLACES = (
    "/usr/local/cuda*/bin",
    "/usr/local/cuda*/compute-sanitizer",
    "/opt/nvidia/nsight-compute/*",
)
PROBE = (sys.executable, "-m", "t5fx.bench.gpu.lease.probe")
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy")
#: Of a profile's metrics those that are told.
TOLD = (
    "Duration",
    "Compute (SM) Throughput",
    "Memory Throughput",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "Registers Per Thread",
    "Achieved Occupancy",
    "Theoretical Occupancy",
    "Waves Per SM",
)
#: What a profiler says that may not read the GPU's counters, or a checker that knows no such GPU.
REFUSED = (
    "ERR_NVGPUCTRPERM",
    "Failed to initialize the profiler",
    "LibraryNotLoaded",
    "Device not supported",
    "not supported on this device",
    "Unable to find injection library",
    "Failed to connect",
    "No kernels were profiled",
)


class Ran(NamedTuple):
    code: int
    output: str


def ncu(context: Context, name: str) -> Iterator[Row]:
    """What limits the two costliest kernels, by the hardware's counters."""
    experiment = Experiment("lease", name, _none, ALONE[2], ALONE[0], "bfloat16", "training")
    matrix = [kernel for kernel, rows in configs.HALF.items() if rows[64].block_m]
    watched = context.facts.get("costliest") or matrix[-2:]
    path = found("ncu")
    if context.rehearse or path is None:
        yield unavailable(experiment, "ncu", "a rehearsal" if context.rehearse else "not installed")
        return
    command = [path, "--clock-control", "none", "--csv", "--launch-count", "4"]
    command += ["--kernel-name", f"regex:^({'|'.join(watched)})$"]
    for section in SECTIONS:
        command += ["--section", section]
    ran = call([*command, *PROBE, *map(str, ALONE), "128"])
    (Path(context.facts["out"]) / "ncu.txt").write_text(ran.output[:300_000], encoding="utf-8")
    rows = list(profiled(experiment, ran.output))
    if not rows:
        yield unavailable(experiment, "ncu", reason(ran))
    yield from rows


def profiled(experiment: Experiment, output: str) -> Iterator[Row]:
    """Rows of a profile that `ncu --csv` printed."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    launches: dict[str, str] = {}
    for line in csv.DictReader(lines):
        metric, value = line.get("Metric Name"), line.get("Metric Value") or ""
        if metric not in TOLD or line.get("Kernel Name") is None:
            continue
        kernel = line["Kernel Name"].partition("(")[0]
        launch = launches.setdefault(line.get("ID", ""), f"{kernel}, launch {len(launches) + 1}")
        try:
            number = float(value.replace(",", ""))
        except ValueError:
            continue
        about = {"unit": line.get("Metric Unit") or "", "detail": f"grid {line.get('Grid Size')}"}
        yield experiment.row(launch, metric, number, **about)


def sanitizer(context: Context, name: str, tool: str) -> Iterator[Row]:
    """How many errors CUDA's own checker finds in a small forward and backward."""
    experiment = Experiment("lease", name, _none, 144, 1, "bfloat16", "training")
    path = found("compute-sanitizer")
    if context.rehearse or path is None:
        why = "a rehearsal" if context.rehearse else "not installed"
        yield unavailable(experiment, "compute-sanitizer", why)
        return
    command = [path, "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":  # torch asks the driver for what this one may not have
        command += ["--report-api-errors", "no"]
    # Each tensor an allocation of its own, or what lies behind one would be another's.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ran = call([*command, *PROBE, "1", "2", "144", "64", "72"], environment)
    (Path(context.facts["out"]) / f"{tool}.txt").write_text(ran.output[-100_000:], encoding="utf-8")
    yield checked(experiment, ran)


def checked(experiment: Experiment, ran: Ran) -> Row:
    """The row of what a checker printed."""
    counts = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", ran.output)
    if any(sign in ran.output for sign in REFUSED) or not counts:
        return unavailable(experiment, "compute-sanitizer", reason(ran))
    count = max(int(one or other) for one, other in counts)
    if count == 0 and ran.code == 0:
        return experiment.row("compute-sanitizer", "errors", 0.0, better="lower")
    lines = [line.strip("= ") for line in ran.output.splitlines() if line.startswith("=====")]
    said = next((line for line in lines if line and "COMPUTE-SANITIZER" not in line), "")
    detail = f"{count} errors, exit code {ran.code}: {said}"
    return experiment.row(
        "compute-sanitizer", "errors", float(count), status="refused", detail=detail
    )


def unavailable(experiment: Experiment, tool: str, why: str) -> Row:
    return experiment.row(tool, "", status="absent", detail=f"unavailable: {why}"[:300])


def reason(ran: Ran) -> str:
    """The line that says why a tool did nothing, or its last one."""
    lines = [line.strip("= ") for line in ran.output.splitlines() if line.strip("= ")]
    signs = (*REFUSED, "ERROR", "rror:")
    told = [line for line in lines if any(sign in line for sign in signs)]
    return next(iter(told or lines[-1:]), f"exit code {ran.code}, and it printed nothing")


def found(tool: str) -> str | None:
    """A tool's path."""
    places = [place for pattern in PLACES for place in sorted(glob.glob(pattern), reverse=True)]
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(places))


def call(command: list[str], environment: dict[str, str] | None = None) -> Ran:
    """Run a command; what it printed. The lease ends it where it takes too long."""
    child = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return Ran(child.returncode, child.stdout)
