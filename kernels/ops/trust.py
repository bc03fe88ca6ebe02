"""Whether the Triton kernels are right on a GPU: checked once there, and remembered.

The check is a process of its own (``t5fx.kernels.triton_kernels.check``): a bad kernel can poison a
CUDA context, crash or hang. Its verdict is kept in the cache folder by all that decides which
machine code runs. Triton is not imported here but to ask which assembler it would take.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from t5fx import cache
from t5fx.digest import code_digest
from t5fx.errors import SlowNodeWarning

log = logging.getLogger(__name__)

#: Set to 0 it keeps "auto" from the Triton kernels, unchecked.
SWITCH = "T5FX_TRITON"
#: Seconds that a check may take, most of them compiling.
LIMIT = 600.0
#: The words of the check's result come after this on a line of its output.
MARK = "t5fx-verdict "


@dataclass(frozen=True)
class Question:
    """Which kernels: all that decides their machine code, but for the device and the software.

    width: a head's, padded to a power of two. axes: of the grid, 0 where it is not read.
    direction: "forward" or "backward", which includes the forward. node: the whole variant, sorted
    pairs of a setting's name and its value.
    """

    dtype: str
    width: int
    axes: int
    direction: str
    node: tuple[tuple[str, Any], ...]


class Verdict(NamedTuple):
    """status: "passed", "failed", or "impossible", where nothing could be found out."""

    status: str
    reason: str

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def is_off() -> bool:
    """Whether the user has switched the kernels off for "auto"."""
    return os.environ.get(SWITCH, "1").strip().lower() in ("0", "false", "off", "no")


def verdict(question: Question, device: torch.device) -> Verdict:
    """The verdict on a device, from memory, from the folder, or by a check now.

    No state of CUDA changes in this process, and it takes LIMIT seconds at most beside waiting as
    long for another process that checks the same: it may be asked while a graph is traced. A
    verdict stays what it is for the life of a process. One that did not pass is warned of, once.
    """
    # Inductor names an assembler of its own there when it is imported.
    at = (question, str(device), os.environ.get("TRITON_PTXAS_PATH"))
    found = _known.get(at)
    if found is None:
        with _one_at_a_time:
            found = _known.get(at)
            if found is None:
                found, key = _find(question, device)
                _known[at] = found
                if not found.passed and key not in _warned:
                    _warned.add(key)
                    _warn(found, question, device, key)
    return found


_known: dict[tuple[Question, str, str | None], Verdict] = {}
#: The keys of what was warned of: GPUs of a kind share one.
_warned: set[str] = set()
_one_at_a_time = threading.Lock()


def _find(question: Question, device: torch.device) -> tuple[Verdict, str]:
    """The verdict, and the key that it is kept by."""
    try:
        key = json.dumps(key_of(question, device), sort_keys=True)
    except Exception as error:  # whatever Triton or the driver says
        return Verdict("impossible", f"{type(error).__name__}: {error}"), str((question, device))
    kept = _load(key)
    if kept is None:
        with _only_one(key):
            kept = _load(key) or _check(question, device, key)
    return kept, key


def key_of(question: Question, device: torch.device) -> dict[str, Any]:
    """All that a verdict depends on, as plain data."""
    gpu = gpu_of(device)
    return {
        **asdict(question),
        "gpu": gpu.name,
        "capability": gpu.capability,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "assembler": assembler(gpu.capability),
        "code": code_digest(),
    }


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]


def gpu_of(device: torch.device) -> Gpu:
    """What tells one GPU's machine code from another's."""
    return Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def assembler(capability: tuple[int, int]) -> list[str]:
    """Path and version of the ptxas that Triton takes for a GPU, by its own rule."""
    if torch.version.hip is not None:
        return [torch.version.hip]
    tool = _ptxas(10 * capability[0] + capability[1])
    return [str(tool.path), str(tool.version)]


def _ptxas(architecture: int) -> Any:
    """Triton's record of it; the user's choice (TRITON_PTXAS_PATH, triton.knobs) is in there."""
    from triton.backends.nvidia.compiler import get_ptxas  # slow to import

    return get_ptxas(architecture)


# --- kept -----------------------------------------------------------------------------------------


def _load(key: str) -> Verdict | None:
    data = cache.load("trust", key)
    if data is None or data.get("status") not in ("passed", "failed"):
        return None
    return Verdict(data["status"], str(data.get("reason", "")))


@contextlib.contextmanager
def _only_one(key: str) -> Iterator[None]:
    """One process checks, the others wait for it: as long as a check may take, then they check too.

    The lock is the system's, which ends with the process that holds it.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    path = cache.file_of("trust", key).with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError:
        yield
        return
    with file:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield


def _warn(found: Verdict, question: Question, device: torch.device, key: str) -> None:
    what = f"{question.dtype}, heads of up to {question.width}, {question.direction}"
    cure = "mend that"
    if found.status == "failed":
        cure = f"remove {cache.file_of('trust', key)} to have them checked again"
    warnings.warn(
        f'impl="auto" runs the PyTorch reference on {device} instead of the Triton kernels '
        f"({what}), whose check {'failed' if found.status == 'failed' else 'was impossible'}: "
        f"{found.reason}; {cure}, update the driver, torch or Triton, or give "
        f'impl="reference" or {SWITCH}=0, which silences this warning',
        SlowNodeWarning,
        stacklevel=2,
    )


# --- the check ------------------------------------------------------------------------------------


def _check(question: Question, device: torch.device, key: str) -> Verdict:
    """Ask the other process. Anything but a lack of means is kept."""
    log.warning(
        "checking the Triton kernels on %s once (%s, heads of up to %d, %s): minutes",
        *(device, question.dtype, question.width, question.direction),
    )
    begin = time.monotonic()
    found = _outcome(_ask(question, device))
    log.info("%s after %.0f s: %s", found.status, time.monotonic() - begin, found.reason)
    if found.status != "impossible":
        fact = {"status": found.status, "reason": found.reason}
        cache.save("trust", key, fact, "verdicts on the Triton kernels")
    return found


def _command() -> list[str]:
    """The checking process; what it is to check comes on its standard input."""
    return [sys.executable, "-P", "-m", "t5fx.kernels.triton_kernels.check"]


def _environment(device: torch.device) -> dict[str, str]:
    """This one's, with what was set in Python alone: where modules lie, and the assembler.

    Inductor keeps compiled graphs by what is in them, which is not all of our code.
    """
    own = dict(os.environ)
    own["PYTHONPATH"] = os.pathsep.join(str(path) for path in sys.path if path)
    own["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    own["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # it ends with all that it has started
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = gpu_of(device).capability
        path = str(_ptxas(10 * major + minor).path)
        own["TRITON_PTXAS_PATH"] = own["TRITON_PTXAS_BLACKWELL_PATH"] = path
    return own


def _ask(question: Question, device: torch.device) -> subprocess.CompletedProcess[str] | str:
    """The process when it has ended, or in words why there is none."""
    given = json.dumps({"device": str(device), **asdict(question)})
    try:
        child = subprocess.Popen(
            _command(),
            env=_environment(device),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return f"no process could be started: {error}"
    try:
        out, err = child.communicate(given, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        _end(child)
        return subprocess.CompletedProcess(child.args, None, "", "")  # type: ignore[arg-type]
    except BaseException:
        _end(child)
        raise
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def _end(child: subprocess.Popen[str]) -> None:
    """Kill a process and all processes that it has started."""
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.communicate()


def _outcome(child: subprocess.CompletedProcess[str] | str) -> Verdict:
    if isinstance(child, str):
        return Verdict("impossible", child)
    if child.returncode is None:
        return Verdict("failed", f"not done after {LIMIT:.0f} s")
    for line in reversed(child.stdout.splitlines()):
        if line.startswith(MARK):
            data = json.loads(line.removeprefix(MARK))
            return Verdict(data["status"], data["reason"])
    last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1][:500]
    if child.returncode < 0:
        name = _signal_name(-child.returncode)
        return Verdict("failed", f"the checking process was ended by {name}: {last}")
    return Verdict("impossible", f"the checking process ended with {child.returncode}: {last}")


@functools.cache
def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
