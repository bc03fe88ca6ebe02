"""One lease: its clock, its workers, and its steps, every result on disk at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from t5fx.atomic import replacing
from t5fx.errors import T5Error

from ...harness.records import Records, columns_of
from ...harness.results import Row
from ..assembler import VARIABLES, Assembler
from . import summary
from .child import COMMAND, Child
from .plan import Item, Step

#: Seconds before the end that are kept for the summary.
SPARE = 2.0
MACHINE = Step("machine", (Item("machine", "machine.ceilings", {}, 60),), 60)
HERE_SECONDS = 60.0


@dataclass(frozen=True)
class Options:
    """Of a lease.

    out: the folder. seconds: that the whole may take. rehearse: "", "tiny" or "full": see
    `worker.Context`. ptxas: a path. command: of a worker. steps: names, of some steps alone.
    """

    out: Path
    seconds: float = 570.0
    rehearse: str = ""
    ptxas: str | None = None
    command: tuple[str, ...] = COMMAND
    steps: tuple[str, ...] = ()


@dataclass
class Lease:
    """One run of the plan.

    begun: when the clock started (`time.monotonic`). newer, chosen: the assembler beside Triton's
    own, and the one that counts after parity.
    """

    options: Options
    console: Console
    begun: float = field(default_factory=time.monotonic)
    records: Records = field(init=False)
    own: Assembler | None = None
    newer: Assembler | None = None
    chosen: Assembler | None = None

    def __post_init__(self) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.records = Records(self.options.out / "rows.jsonl")
        self._log = (self.options.out / "log.txt").open("ab")
        self._children: list[Child] = []
        self._spare: Child | None = None
        self._lock = threading.Lock()

    @property
    def rehearsed(self) -> bool:
        return bool(self.options.rehearse)

    @property
    def end(self) -> float:
        return self.begun + self.options.seconds - SPARE

    def left(self) -> float:
        return self.end - time.monotonic()

    def close(self) -> None:
        """End all workers, then say what there is."""
        for child in list(self._children):
            child.kill()
        self.summarise()
        self.records.close()
        self._log.close()

    def pending(self, step: Step) -> list[Item]:
        """Its items that are not done."""
        return [i for i in step.items if not self.records.outcome(step.name, i.name).done]

    def summarise(self) -> None:
        text = summary.text(self.records, time.monotonic() - self.begun)
        with replacing(self.options.out / "summary.txt") as scratch:
            scratch.write_text(text, encoding="utf-8")

    def say(self, text: str, style: str | None = None) -> None:
        seconds = time.monotonic() - self.begun
        self.console.print(
            f"{seconds:5.0f} s  {text}", style=style, markup=False, highlight=False, soft_wrap=True
        )

    def allowed(self, seconds: float) -> float:
        """A budget; the interpreter's is larger."""
        return 4 * seconds if self.rehearsed else seconds

    def columns(self) -> dict[str, Any]:
        """What identifies the machine and the code, asked of a worker: it may see a GPU."""
        child = self.child(self.environment(None))
        child.send({"columns": True})
        until = min(self.end, time.monotonic() + self.allowed(HERE_SECONDS))
        try:
            said = child.hear(until)
        except TimeoutError:
            taken = time.monotonic() - self.begun
            raise T5Error(
                f"expected a worker that starts in time, got none after {taken:.0f} s of "
                f"{self.options.seconds:.0f}: give the lease more --seconds, or see log.txt"
            ) from None
        if said is None:
            raise T5Error(f"expected a worker that starts, but {child.death()}: see log.txt")
        self._spare = child
        columns: dict[str, Any] = said["columns"]
        if self.rehearsed:
            columns["device"] += ", rehearsal"
        elif not said["gpu"]:
            raise T5Error("expected a CUDA GPU, got none; --rehearse runs the plan on a CPU")
        return columns

    def architecture(self) -> str:
        """Of the GPU, as the first step told; without one that of a Hopper."""
        rows = self.records.outcome(MACHINE.name, MACHINE.items[0].name).rows
        told = [row.detail for row in rows if row.measure == "multiprocessors"]
        return told[0] if told else "sm_90"

    def assemblers(self) -> dict[str, Assembler]:
        both = {"own": self.own, "newer": self.newer}
        return {name: one for name, one in both.items() if one is not None}

    # --- a step -----------------------------------------------------------------------------------

    def step(self, step: Step) -> None:
        """Run what is left of a step, as far as its budget goes."""
        if step.assembler == "newer" and self.newer is None:
            return
        used = {"own": self.own, "newer": self.newer}.get(step.assembler, self.chosen)
        pending = self.pending(step)
        if not pending:
            self.say(f"{step.name}: there already")
            return
        self.say(f"{step.name}: {len(pending)} of {len(step.items)}")
        until = min(self.end, time.monotonic() + self.allowed(step.seconds))
        while pending:
            if until - time.monotonic() < min(step.least, self.allowed(step.seconds) / 2):
                self.out_of_time(step.name, pending)
                return
            child = self._take(self.environment(used))
            pending = self.drive(child, step.name, pending, until)
            if not pending and self.rehearsed and child.alive:
                self._spare = child
            else:
                self.drop(child)

    def drive(
        self,
        child: Child,
        step: str,
        items: Sequence[Item],
        until: float,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[Item]:
        """Have a worker run items; returns those that are left where it is of no more use."""
        context = {
            "rehearse": self.rehearsed,
            "tiny": self.options.rehearse == "tiny",
            "facts": self.facts(),
        }
        child.send({"items": [asdict(item) for item in items], "context": context})
        pending = {item.name: item for item in items}
        running: str | None = None
        since = time.monotonic()
        while True:
            item = pending[running] if running else next(iter(pending.values()), None)
            limit = since + self.allowed(item.seconds) if item else until
            try:
                said = child.hear(min(until, limit))
            except TimeoutError:
                child.kill()
                if item is None or limit >= until:
                    self.out_of_time(step, pending.values())
                    return []
                why = f"killed: it took more than {self.allowed(item.seconds):.0f} s"
                self._close(step, pending.pop(item.name), "failed", why)
                return list(pending.values())
            if said is None:
                if stopped():
                    return list(pending.values())
                if item is not None and (running or len(pending) == len(items)):
                    self._close(step, pending.pop(item.name), "failed", child.death())
                return list(pending.values())
            if said["kind"] == "idle":
                return []
            if said["kind"] == "row":
                self.records.row(step, said["item"], said["row"])
                self._show(step, said["row"])
                continue
            since = time.monotonic()
            if said["kind"] == "begin":
                running = said["item"]
                self.records.begin(step, running)
            elif said["kind"] == "end":
                running = None
                self.records.end(step, said["item"], said["end"], said["seconds"])
                pending.pop(said["item"], None)

    def _show(self, step: str, row: dict[str, Any]) -> None:
        status = row.get("status", "ok")
        who = ", ".join(filter(None, (step, row["case"], row["contender"], row["measure"])))
        if status in ("refused", "failed"):
            self.say(f"{status.upper()}: {who}: {row.get('detail', '')}", "bold red")
        elif status == "absent":
            self.say(f"{who}: {row.get('detail', '')}", "dim")

    def out_of_time(self, step: str, items: Iterable[Item]) -> None:
        for item in items:
            self._close(step, item, "absent", "out of time", end="out of time")
        self.say(f"{step}: out of time", "yellow")

    def _close(self, step: str, item: Item, status: str, why: str, end: str = "failed") -> None:
        about = {"suite": "lease", "case": item.name, "tokens": 0, "batch": 1, "dtype": ""}
        row = Row(
            **about, mode="", contender="", measure="", status=status, detail=f"{step}: {why}"
        )
        if self.records.outcome(step, item.name).end:  # of an earlier run
            self.records.begin(step, item.name)
        self.records.row(step, item.name, columns_of(row))
        self.records.end(step, item.name, end, 0.0)
        if status == "failed":
            self._show(step, columns_of(row))

    # --- workers ----------------------------------------------------------------------------------

    def environment(self, used: Assembler | None, compiles: bool = False) -> dict[str, str]:
        """Of a worker; without an assembler, Triton decides. compiles: it makes code for a GPU, and
        sees none itself.
        """
        interpreted = self.rehearsed and not compiles
        found = dict.fromkeys(VARIABLES, used.path) if used and not interpreted else {}
        found |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
        if compiles:
            found["CUDA_VISIBLE_DEVICES"] = ""
        elif interpreted:
            found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        return found

    def child(self, environment: dict[str, str]) -> Child:
        child = Child(self.options.command, environment, self._log)
        with self._lock:
            self._children.append(child)
        return child

    def drop(self, child: Child) -> None:
        child.kill()
        with self._lock:
            if child in self._children:
                self._children.remove(child)

    def _take(self, environment: dict[str, str]) -> Child:
        """The worker that has imported everything meanwhile, and a new one in its place."""
        self.prepare(environment)
        child, self._spare = self._spare, None
        assert child is not None
        if not self.rehearsed:  # there one worker goes from step to step
            self._spare = self.child(environment)
        return child

    def prepare(self, environment: dict[str, str]) -> None:
        """Have a worker for it that imports everything."""
        spare = self._spare
        if spare is None or spare.environment != environment or not spare.alive:
            if spare is not None:
                self.drop(spare)
            self._spare = self.child(environment)

    # --- what later steps need of earlier ones ----------------------------------------------------

    def facts(self) -> dict[str, Any]:
        return {
            "out": str(self.options.out.resolve()),
            "costliest": summary.costliest(self.records),
        }

    def choose(self) -> None:
        """The assembler to go on with: Triton's own where it holds, else the newer if that does."""
        parts = {"own": "parity", "newer": "parity, newer assembler"}
        counts = {name: summary.ended(self.records, step) for name, step in parts.items()}
        (wrong, right), (new_wrong, new_right) = counts.values()
        self.chosen = self.own
        if self.newer is not None and new_wrong < wrong and new_right > right:
            self.chosen = self.newer
        for name, used in self.assemblers().items():
            taken = ", and the lease goes on with it" if used == self.chosen else ""
            wrong, right = counts[name]
            said = f"{right} cases are right, {wrong} wrong"
            self.say(f"{used} ({name}): {said}{taken}", "bold")
            row = Row(
                *("lease", "assemblers", 0, 1, "", ""),
                contender=f"{used}, {name}",
                measure="wrong cases of parity",
                value=float(wrong),
                detail=f"{used.path}{taken}",
            )
            key = ("assembler", name)
            self.records.begin(*key)
            self.records.row(*key, columns_of(row))
            self.records.end(*key, "ok", 0.0)
