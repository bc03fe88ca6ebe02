"""Compiles in processes beside the rest of the plan, the most urgent kernels first."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

from .child import Child
from .lease import Lease
from .plan import Item

#: The name of its step.
STEP = "compile"
#: Cores that are left to the process that uses the GPU.
LEFT = 3


class Pool:
    """Threads, each with a worker of its own that sees no GPU.

    groups: (assembler, item) of each, in order; `wait` waits for the first two.
    What was compiled before, Triton finds in its cache: nothing is skipped for its rows, which may
    be of another machine.
    """

    def __init__(self, lease: Lease, groups: list[list[tuple[str, Item]]]) -> None:
        self.lease = lease
        self._queue = [(group, *one) for group, own in enumerate(groups) for one in own]
        self._urgent = {item.name + used for group, used, item in self._queue if group < 2}
        self._changed = threading.Condition()
        self._stopped = False
        self._children: set[Child] = set()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        count = max(1, min(cores - LEFT, len(self._queue)))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]

    def start(self) -> None:
        self.lease.say(f"{STEP}: {len(self._queue)} cases in {len(self._threads)} processes")
        for thread in self._threads:
            thread.start()

    def wait(self, until: float) -> None:
        """For the urgent ones, or until a time of `time.monotonic`."""
        until = min(until, self.lease.end)
        with self._changed:
            while self._urgent and time.monotonic() < until:
                self._changed.wait(max(0.01, until - time.monotonic()))
            missing = len(self._urgent)
        self.lease.say(f"{STEP}: {missing or 'none'} of the urgent cases to come")

    def stop(self) -> None:
        """End the workers; what they had not begun is not compiled."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            left, self._queue = self._queue, []
            self._changed.notify_all()
            children = list(self._children)
        for child in children:
            child.kill()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout=10)
        urgent = [named(item, self.lease, used) for group, used, item in left if group < 2]
        if urgent:
            self.lease.out_of_time(STEP, urgent)

    def _next(self, used: str | None) -> tuple[int, str, Item] | None:
        """The most urgent one, if possible for the assembler that a worker has already."""
        with self._changed:
            if self._stopped or not self._queue:
                return None
            first = self._queue[0][0]
            same = [one for one in self._queue if one[0] == first and one[1] == used]
            taken = (same or self._queue)[0]
            self._queue.remove(taken)
            return taken

    def _work(self) -> None:
        child: Child | None = None
        has = None
        while (taken := self._next(has)) is not None:
            _, used, item = taken
            if child is None or used != has or not child.alive:
                self._drop(child)
                environment = self.lease.environment(self.lease.assemblers()[used], compiles=True)
                child, has = self.lease.child(environment), used
                with self._changed:
                    self._children.add(child)
            self._run(child, used, item)
            with self._changed:
                self._urgent.discard(item.name + used)
                self._changed.notify_all()
        self._drop(child)

    def _drop(self, child: Child | None) -> None:
        if child is not None:
            with self._changed:
                self._children.discard(child)
            self.lease.drop(child)

    def _run(self, child: Child, used: str, item: Item) -> None:
        until = self.lease.end
        one = named(item, self.lease, used)
        try:
            self.lease.drive(child, STEP, [one], until, stopped=lambda: self._stopped)
        except (OSError, ValueError):  # the records were closed: the lease has ended
            return


def named(item: Item, lease: Lease, used: str) -> Item:
    """The item by a name that tells assemblers apart."""
    return replace(item, name=f"{item.name}, {lease.assemblers().get(used, used)}")
