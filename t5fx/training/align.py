"""`Align`: each TTT node learns to do what the softmax attention did that it replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from t5fx.backend.adapters import adapter
from t5fx.errors import TrainingError
from t5fx.frontend.copies import duplicate
from t5fx.pipeline import build
from t5fx.reports import Report
from t5fx.runtime.lookup import is_linearized
from t5fx.runtime.templates import bare
from t5fx.training.batches import Batches, samples
from t5fx.training.muon import Muon
from t5fx.training.nodes import (
    as_call,
    check_count,
    check_positive,
    check_share,
    device_of,
    kept,
    nodes_of,
    progress,
    table,
    warm_cosine,
)
from t5fx.training.processes import (
    accelerator_on,
    average_gradients,
    averaged,
    is_first,
    process_count,
    share_values,
)
from t5fx.training.resume import load_state, save_state
from t5fx.training.sharding import reshard
from t5fx.training.students import Student, find_projections, taught
from t5fx.wrappers import uncompiled


@dataclass
class AlignResult:
    """What an alignment did.

    losses: for each site, by key, one value a step: |TTT - softmax|^2 / |softmax|^2, summed over
    tokens and batch; before: the values of the first step, where no node was trained yet. held_out:
    of each site the same on inputs that were kept from training, before and after, if there were
    any. measured: the module at whose output the two are compared, or "" for the attention's own
    output.
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    held_out: dict[str, tuple[float, float]] = field(default_factory=dict)
    measured: dict[str, str] = field(default_factory=dict)

    @property
    def before(self) -> dict[str, float]:
        return {key: values[0] for key, values in self.losses.items() if values}

    @property
    def after(self) -> dict[str, float]:
        """Mean over the last tenth of a site's steps."""
        last = {key: v[-max(1, len(v) // 10) :] for key, v in self.losses.items()}
        return {key: sum(v) / len(v) for key, v in last.items() if v}

    def __str__(self) -> str:
        before, after = self.before, self.after
        columns = ["site", "before", "after", "measured at"]
        rows = [
            [key, f"{before[key]:.3f}", f"{after[key]:.3f}", self.measured[key] or "attention"]
            for key in before
        ]
        if self.held_out:
            columns[3:3] = ["held out: before", "after"]
            for row in rows:
                row[3:3] = [f"{loss:.3f}" for loss in self.held_out[row[0]]]
        title = f"aligned in {self.steps} steps, {self.samples} samples, {self.seconds:.1f} s"
        return table(title, columns, rows)


#: A loss, of which 1 is that of an output of zero, that many times the first one is no progress.
DIVERGED = 100.0


class _DivergedError(TrainingError):
    """A loss grew a hundredfold."""


@dataclass(frozen=True)
class _Round:
    """Students that learn together, the `index`-th such; before: losses on what is held out."""

    index: int
    students: Mapping[str, Student]
    chosen: Mapping[str, Student]
    before: Mapping[str, float]
    batches: Batches


@dataclass
class Align:
    """A fine-tune hook: train each TTT node to reproduce the softmax attention that it replaces.

    It needs inputs but no labels. The original runs once a step, in eval mode and without
    gradients. The node of each site gets the queries, keys and values of the original and
    minimises, independently of the other nodes, sum_t |P(o_t - a_t)|^2 / sum_t |P a_t|^2 over
    tokens and batch. Here o is the node's output, a that of softmax attention, and P the linear
    layer that reads it, if there is one. Only new parameters that require gradients change. The
    original needs no extra memory: it is the linearized model with its softmax attention put back.

    Use it as a hook, `linearize(model, args, finetune=Align(batches))`, or call it with a model
    that is linearized or compiled with backend="t5", `Align(batches)(lin)`. Afterwards `.result`
    has the losses.

    With several processes (torch.distributed, for example under torchrun) every process makes the
    same call with the same data, of which it takes its share. Gradients and losses are averaged,
    and the nodes start with the values of the first process. FSDP2 may have sharded the model:
    during training each process holds the nodes whole, in float32.

    Args:
        data: batches, iterated as often as needed: a DataLoader, or a list. A mapping is a call's
            keyword arguments, a tuple or list its positional ones, anything else the only one. A
            DataLoader is split over processes by accelerate; of anything else each takes every so
            many-th batch.
        inputs: function from a batch to the inputs of the model, such as `lambda batch: batch[0]`
            for batches that have labels too.
        steps: number of batches to train on.
        lr: peak learning rate of Muon for the inner model's matrices; AdamW trains the convolutions
            and gates at twice that rate. None is 1e-2, or 2e-3 for nodes with near attention, which
            leaves them little to learn.
        warmup: fraction of the steps in which the rate rises linearly; a cosine follows.
        own: fraction of the steps, at the end, in which the following layers get the outputs of the
            nodes instead of those of softmax attention, so that later nodes train on the inputs
            that they will get. The targets are then those of softmax attention on these inputs.
        held_out: batches that are not trained on; the losses on them are measured before and after.
        sequential: the sites learn one after the other, in the order in which they run, each for
            `steps` batches, on the outputs of the sites that have finished. Gradients and the
            optimizer's state of only one site are in memory at a time.
        checkpoint: file to which the state is saved every `save_every` steps. If the file exists,
            the alignment resumes from it, with the same results on a CPU; `t5fx.training.batches`
            describes how random numbers and the position in the data are restored. The file is
            removed at the end.
        save_every: number of steps between two such states.
        until: if it is given, training stops once the mean loss over 50 steps is less than this
            fraction, such as 0.01, below the mean over the 50 steps before.

    Raises:
        TrainingError: there is nothing to train, the data ends, no batch reaches a site, or a loss
            is not finite; the module then has the values of the last valid step, as after an
            interrupt. A loss grew a hundredfold; the module then has the values from before the
            alignment. A checkpoint is damaged or has other settings.
    """

    data: Iterable[Any]
    _: KW_ONLY
    inputs: Callable[[Any], Any] | None = None
    steps: int = 200
    lr: float | None = None
    warmup: float = 0.1
    own: float = 0.0
    held_out: Iterable[Any] | None = None
    sequential: bool = False
    until: float | None = None
    checkpoint: str | Path | None = None
    save_every: int = 100
    result: AlignResult | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count(steps=self.steps, save_every=self.save_every)
        check_positive(**{} if self.lr is None else {"lr": self.lr})
        check_share(own=self.own, warmup=self.warmup)
        if self.until is not None:
            check_positive(until=self.until)

    @torch.inference_mode(False)
    def __call__(self, module: nn.Module, report: Report | None = None) -> None:
        inner = uncompiled(module)
        batches = self._batches(device_of(module))
        first = batches.peek()
        module = self._original(inner, first)
        reshard(module)
        nodes = nodes_of(module)
        device = device_of(module)
        students = {key: Student(key, node) for key, node in nodes.items()}
        share_values(s.node for s in students.values())
        learning = [key for key, student in students.items() if student.parameters]
        if not learning:
            raise TrainingError(
                "nothing to train: expected nodes with parameters that require gradients, got "
                "nodes all of which are frozen"
            )
        self.result = result = AlignResult(losses={key: [] for key in learning})
        start = time.perf_counter()
        with kept(module):
            module.eval().requires_grad_(False)
            args, kwargs = self._call(first, device)
            order = find_projections(module, students, args, kwargs)
            result.measured = {key: s.projection for key, s in students.items()}
            saved = self._resumed(students, device)
            before = saved["before"] if saved else self._measure(module, students, device)
            if saved:
                batches.load_state_dict(saved["batches"])
            sites = [key for key in order if students[key].parameters]
            rounds = [[key] for key in sites] if self.sequential else [sites]
            trained = True
            try:
                for index, keys in enumerate(rounds):
                    chosen = {key: students[key] for key in keys}
                    run = _Round(index, students, chosen, before, batches)
                    if saved is None or index >= saved["round"]:
                        own = saved if saved and index == saved["round"] else None
                        self._train(module, run, own, device)
                    for student in chosen.values():
                        student.passes_on = self.sequential
            except _DivergedError:
                trained = False
                raise
            finally:
                reshard(module)
                for student in students.values() if trained else ():
                    student.give_back()
                result.seconds = time.perf_counter() - start
            for student in students.values():
                student.passes_on = False
            after = self._measure(module, students, device)
            result.held_out = {key: (before[key], after[key]) for key in before}
        if self.checkpoint is not None and is_first():
            Path(self.checkpoint).unlink(missing_ok=True)

    def _train(
        self,
        module: nn.Module,
        run: _Round,
        saved: Mapping[str, Any] | None,
        device: torch.device,
    ) -> None:
        """Train the chosen students for `steps` batches, of which some may be done."""
        assert self.result is not None
        result, chosen, means = self.result, run.chosen, list[float]()
        optimizers = self._optimizers(chosen)
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                one, lambda step: warm_cosine(step, self.steps, self.warmup)
            )
            for one in optimizers
        ]
        parts: dict[str, list[Any]] = {"optimizers": [*optimizers], "schedules": [*schedules]}
        if saved is not None:
            means = list(saved["means"])
            for name, some in parts.items():
                for part, state in zip(some, saved[name], strict=True):
                    part.load_state_dict(state)
        for student in chosen.values():
            student.learns = True
        with progress("align", self.steps) as advance:
            for step in range(len(means), self.steps):
                own = not self.sequential and step >= round(self.steps * (1 - self.own))
                for student in chosen.values():
                    student.passes_on = own
                args, kwargs = self._call(next(run.batches), device)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                with taught(run.students, module):
                    module(*args, **kwargs)
                losses = {key: student.take_loss() for key, student in run.students.items()}
                means.append(self._record({key: losses[key] for key in chosen}, step))
                average_gradients(s.node for s in chosen.values())
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                result.steps += 1
                result.samples += samples((args, kwargs)) * process_count()
                advance(f"mean loss {means[-1]:.3f}")
                if self._is_still(means):
                    break
                if self.checkpoint is not None and (step + 1) % self.save_every == 0:
                    states = {n: [one.state_dict() for one in some] for n, some in parts.items()}
                    place = run.batches.state_dict()
                    self._save(run, {"means": means, "batches": place, **states})
        for student in chosen.values():
            student.learns = False

    def _settings(self, keys: Iterable[str]) -> dict[str, Any]:
        """What a training has to have in common with one that it goes on with."""
        names = ("steps", "lr", "warmup", "own", "sequential")
        return {"sites": list(keys), **{name: getattr(self, name) for name in names}}

    def _save(self, run: _Round, state: Mapping[str, Any]) -> None:
        if not is_first():
            return
        assert self.checkpoint is not None
        assert self.result is not None
        whole = {
            "round": run.index,
            "before": run.before,
            "nodes": {key: student.node.state_dict() for key, student in run.students.items()},
            "steps": self.result.steps,
            "samples": self.result.samples,
            "losses": self.result.losses,
        }
        save_state(Path(self.checkpoint), self._settings(run.students), {**whole, **state})

    def _resumed(
        self, students: Mapping[str, Student], device: torch.device
    ) -> dict[str, Any] | None:
        """The state that an interrupted alignment left, its values in students and result."""
        if self.checkpoint is None:
            return None
        saved = load_state(Path(self.checkpoint), self._settings(students), device)
        if saved is not None:
            assert self.result is not None
            for key, student in students.items():
                student.node.load_state_dict(saved["nodes"][key])
            self.result.steps, self.result.samples = saved["steps"], saved["samples"]
            self.result.losses = saved["losses"]
        return saved

    def _is_still(self, means: list[float]) -> bool:
        """Whether the loss falls no more; it is the mean over all processes: all stop at once."""
        if self.until is None or len(means) < 100:
            return False
        earlier, later = sum(means[-100:-50]), sum(means[-50:])
        return later > (1 - self.until) * earlier

    @torch.no_grad()
    def _measure(
        self, module: nn.Module, students: Mapping[str, Student], device: torch.device
    ) -> dict[str, float]:
        """The mean loss of each site on the inputs that are held out."""
        found: dict[str, list[Tensor]] = {key: [] for key in students}
        for batch in self.held_out or ():
            args, kwargs = self._call(batch, device)
            with taught(students, module):
                module(*args, **kwargs)
            for key, student in students.items():
                found[key].append(student.take_loss())
        return {key: float(torch.stack(v).mean()) for key, v in found.items() if v}

    def _optimizers(self, students: Mapping[str, Student]) -> list[torch.optim.Optimizer]:
        trained = [p for s in students.values() for p in s.parameters.values()]
        matrices = [p for p in trained if p.dim() == 3]
        convolutions = [p for p in trained if p.dim() != 3]
        lr = self.lr
        if lr is None:
            lr = 2e-3 if any(s.node.variant.is_near for s in students.values()) else 1e-2
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            optimizers.append(Muon(matrices, lr, momentum=0.9))
        if convolutions:
            adam = torch.optim.AdamW(convolutions, 2 * lr, betas=(0.9, 0.95), weight_decay=0.0)
            optimizers.append(adam)
        return optimizers

    def _batches(self, device: torch.device) -> Batches:
        """The batches of this process."""
        if process_count() == 1 or not isinstance(self.data, DataLoader):
            return Batches(self.data)
        accelerator = accelerator_on(device)
        loader = accelerator.prepare_data_loader(self.data)
        return Batches(loader, accelerator.skip_first_batches)

    def _original(self, module: nn.Module, batch: Any) -> nn.Module:
        """The linearized form of what is to be aligned, on the same new parameters.

        A model that was compiled without being linearized is linearized here, by a batch.
        """
        if is_linearized(module):
            return module
        new = adapter(module)
        device = next(new.parameters()).device
        template = bare(duplicate(module, share=True)).eval()
        args, kwargs = self._call(batch, device)
        return build(template, args, kwargs, new.linearize_config, new.nodes(), inplace=True)

    def _call(self, batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return as_call(batch, device, self.inputs)

    def _rate(self) -> str:
        return "" if self.lr is None else f" ({self.lr})"

    def _record(self, losses: Mapping[str, Tensor], step: int) -> float:
        """Keep the losses of a step; their mean. Raises where one is not finite."""
        assert self.result is not None
        values = averaged(torch.stack(list(losses.values()))).tolist()
        for key, loss in zip(losses, values, strict=True):
            if not loss < float("inf"):
                raise TrainingError(
                    f"'{key}': expected a finite loss, got {loss} at step {step}: lower lr"
                    f"{self._rate()}, or look for inputs that are not finite; the nodes have the "
                    f"values of the step before"
                )
        for key, loss in zip(losses, values, strict=True):
            self.result.losses[key].append(loss)
            first = self.result.losses[key][0]
            if loss > DIVERGED * max(1.0, first):
                raise _DivergedError(
                    f"'{key}': expected a loss that falls, got {first:.3g} in the first step and "
                    f"{loss:.3g} in step {step}: lower lr{self._rate()}; all nodes are as they were"
                )
        return sum(values) / len(values)
