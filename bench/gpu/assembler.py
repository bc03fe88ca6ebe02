"""The assemblers at hand: ptxas, which turns Triton's PTX into machine code.

Triton 3.6 carries that of CUDA 12.8, for which there are reports of wrong results of wgmma
instructions (see `tune.most_stages`). A torch with CUDA 13 carries a newer one, which Inductor
takes for all that it compiles, in its own process and others: so each of the lease's processes is
told which to take.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: What Triton and Inductor read; the second is of newer GPUs and, in newer Tritons, of all from
#: Hopper on.
VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


@dataclass(frozen=True)
class Assembler:
    """path: of the program; version: as it says, (12, 8, 93)."""

    path: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"ptxas {'.'.join(map(str, self.version))}"


def own(capability: int = 90) -> Assembler | None:
    """The one of those that Triton carries that it uses for a GPU of that compute capability."""
    name = Path(getattr(_tool(capability), "path", "ptxas")).name
    return next(filter(None, map(found, _in_triton(name))), None)


def used(capability: int = 90) -> Assembler | None:
    """The one that Triton uses in this process."""
    return found(getattr(_tool(capability), "path", None))


def _tool(capability: int) -> Any:
    """Triton's entry, which the variables change."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return get_ptxas(capability)
    except (ImportError, RuntimeError):  # another Triton, or one without assemblers
        return None


def newest(given: str | None = None, capability: int = 90) -> Assembler | None:
    """The newest at hand that is newer than Triton's own; one that is given is taken as it is."""
    mine = own(capability)
    if given:
        return found(given)
    at_hand = [a for a in map(found, _places()) if a and (mine is None or a.version > mine.version)]
    return max(at_hand, key=lambda a: a.version, default=None)


def found(path: str | Path | None) -> Assembler | None:
    """The program at a path, if it is a ptxas that says its version."""
    if not path:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.search(r"\bV(\d+(?:\.\d+)+)", said.stdout)
    return Assembler(str(path), tuple(map(int, version[1].split(".")))) if version else None


def _places() -> Iterator[str | Path | None]:
    yield from map(os.environ.get, VARIABLES)
    yield shutil.which("ptxas")
    for home in filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda")):
        yield Path(home) / "bin" / "ptxas"
    yield from _in_triton("ptxas-blackwell")
    torch = find_spec("torch")
    if torch and torch.origin:
        yield Path(torch.origin).parent / "bin" / "ptxas"


def _in_triton(name: str) -> Iterator[Path]:
    triton = find_spec("triton")
    if triton and triton.origin:
        yield Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
