"""Compiles the C++ files of this folder with Inductor's compiler and flags, and keeps them."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import tempfile
import threading
import time
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from t5fx.errors import SlowNodeWarning

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
#: Of a file's name, its library, being compiled.
_started: dict[str, "Future[ctypes.CDLL]"] = {}
_lock = threading.Lock()


def start(name: str) -> "Future[ctypes.CDLL]":
    """Begin to compile ``<name>.cpp`` in the background, unless that was done; its library.

    It is kept in Inductor's cache folder, for this kind of processor, compiler command and version
    of torch. What goes wrong is an exception of the future.
    """
    if name in _started:
        return _started[name]
    future: Future[ctypes.CDLL] = Future()
    try:
        # Not in the thread, where it could meet another import of the same modules.
        from torch._inductor import cpp_builder
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        task = (future, name, cpp_builder, Path(cache_dir()) / "t5fx")
        with _lock:
            if _started.setdefault(name, future) is future:
                threading.Thread(target=_run, args=task, daemon=True).start()
    except Exception as error:
        _started.setdefault(name, future).set_exception(error)
    return _started[name]


def forget() -> None:
    """Start afresh: what was loaded stays in use, the next call looks for it on disk again."""
    with _lock:
        _started.clear()
    is_available.cache_clear()


@functools.cache
def is_available(name: str) -> bool:
    """Whether ``<name>.cpp`` can be compiled; waits until it is. Warns if not, once."""
    try:
        start(name).result()
    except Exception as error:
        warnings.warn(
            f"the TTT node runs as ordinary PyTorch operators, which are slower: {name}.cpp "
            f"could not be compiled ({type(error).__name__}: {str(error).strip()[-700:]}). "
            f"Expected a C++ compiler such as g++ or clang, which torch.compile needs on a CPU "
            f"too; CXX names it",
            SlowNodeWarning,
            stacklevel=2,
        )
        return False
    return True


def _afresh() -> None:
    """A forked process has no thread that would end what its parent had begun, or free the lock."""
    global _lock
    _lock = threading.Lock()
    forget()


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=_afresh)


def _run(future: "Future[ctypes.CDLL]", name: str, builder: Any, folder: Path) -> None:
    try:
        future.set_result(_load(name, builder, folder))
    except BaseException as error:
        future.set_exception(error)


def _load(name: str, builder: Any, folder: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    # Inductor's own flags keep products and sums apart; here they shall be one instruction.
    options = builder.CppTorchOptions(extra_flags=["-ffp-contract=fast", f"-I{_HERE}", *flags])
    sources = [*sorted(_HERE.glob("*.h")), _HERE / f"{name}.cpp"]
    source = str(sources[-1])
    command = builder.CppBuilder(name, source, options).get_command_line()
    machine = (platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__)
    sha = hashlib.sha256(repr((command, *machine)).encode())
    for path in sources:
        sha.update(path.read_bytes())
    kept = folder / f"{name}-{sha.hexdigest()[:16]}.so"
    if kept.exists():
        try:
            return ctypes.CDLL(str(kept))
        except OSError as error:
            log.warning("%s is damaged and compiled again: %s", kept, error)
    folder.mkdir(parents=True, exist_ok=True)
    since = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        build = builder.CppBuilder(name, source, options, output_dir=scratch)
        build.build()
        # In one step: another process may do the same.
        os.replace(build.get_target_file_path(), kept)
    log.info("compiled %s.cpp in %.1f s: %s", name, time.perf_counter() - since, kept)
    return ctypes.CDLL(str(kept))
