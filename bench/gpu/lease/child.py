"""A process that runs items for the lease, and what it says."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import IO, Any

COMMAND = (sys.executable, "-m", "t5fx.bench.gpu.lease.worker")
#: The environment variable that tells a worker whose child it is.
PARENT = "T5FX_LEASE_PARENT"


class Child:
    """A worker, which imports what it needs and then waits for jobs.

    environment: beside the parent's. log: where its output goes that is not for the lease.
    """

    def __init__(
        self, command: tuple[str, ...], environment: Mapping[str, str], log: IO[bytes]
    ) -> None:
        self.environment = dict(environment)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **environment, PARENT: str(os.getpid())},
            start_new_session=True,  # so that it is killed with all that it started
        )
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, job: dict[str, Any]) -> None:
        """Give it a job; one that has died says so when it is listened to."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def hear(self, until: float) -> dict[str, Any] | None:
        """Its next message, or None where it died; `TimeoutError` at a time of `time.monotonic`."""
        try:
            return self._said.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End it and all that it started, at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def death(self) -> str:
        """How it ended, for people."""
        code = self._process.wait()
        if code < 0:
            return f"the process was ended by {signal.Signals(-code).name}"
        return f"the process ended with code {code}"

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError, OSError):  # closed
            for message in _parsed(self._process.stdout):
                self._said.put(message)
        self._said.put(None)


def _parsed(lines: IO[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                yield message


def end_with_parent() -> None:
    """Of a worker: Linux ends this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):  # it has ended already
            os.kill(os.getpid(), signal.SIGKILL)
