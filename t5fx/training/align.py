"""`Align`: each TTT node learns to do what the softmax attention did that it replaced."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from t5fx.backend.adapters import adapter
from t5fx.errors import TrainingError
from t5fx.frontend.copies import duplicate
from t5fx.kernels import TTT
from t5fx.pipeline import build
from t5fx.reports import Report
from t5fx.runtime.lookup import is_linearized
from t5fx.runtime.templates import bare
from t5fx.training.muon import Muon
from t5fx.training.nodes import (
    as_call,
    check_positive,
    endless,
    kept,
    nodes_of,
    progress,
    samples,
    table,
    warm_cosine,
)


@dataclass
class AlignResult:
    """What an alignment did.

    losses: for each site, by key, one value a step: |TTT - softmax|^2 / |softmax|^2, summed over
    tokens and batch; before: the values of the first step, where no node was trained yet. measured:
    the module at whose output the two are compared, or "" for the attention's own output.
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    measured: dict[str, str] = field(default_factory=dict)

    @property
    def before(self) -> dict[str, float]:
        return {key: values[0] for key, values in self.losses.items()}

    @property
    def after(self) -> dict[str, float]:
        """Mean over the last tenth of the steps."""
        last = max(1, self.steps // 10)
        return {key: sum(v[-last:]) / len(v[-last:]) for key, v in self.losses.items()}

    def __str__(self) -> str:
        before, after = self.before, self.after
        rows = [
            [key, f"{before[key]:.3f}", f"{after[key]:.3f}", self.measured[key] or "attention"]
            for key in self.losses
        ]
        title = f"aligned in {self.steps} steps, {self.samples} samples, {self.seconds:.1f} s"
        return table(title, ["site", "before", "after", "measured at"], rows)


@dataclass
class Align:
    """A fine-tune hook: regress each TTT node onto the softmax attention that it replaces.

    Needs inputs and no labels. The original runs once a step, in eval mode and without gradients;
    each site's node gets the true queries, keys and values of the original and minimises, apart
    from all others, sum_t |P(o_t - a_t)|^2 / sum_t |P a_t|^2 over tokens and batch, where o is its
    output, a the softmax attention's and P the linear layer that reads it, if one does. Only the
    new parameters change. The original needs no memory of its own: it is the linearized model with
    the softmax put back in every node.

    As a hook: `linearize(model, args, finetune=Align(batches))`; or called with a linearized model,
    one compiled with backend="t5", or its torch.compile: `Align(batches)(lin)`. Afterwards
    `.result` has the losses.

    Args:
        data: batches, iterated as often as needed: a DataLoader, or a list. A mapping is a call's
            keyword arguments, a tuple or list its positional ones, anything else the only one.
        inputs: what of a batch the model is called with, such as `lambda batch: batch[0]` where
            batches have labels too.
        steps: how many batches.
        lr: peak learning rate of Muon for the inner model's matrices; AdamW has twice that for the
            convolutions. Linear warm-up over a fraction `warmup` of the steps, then a cosine.

    Raises:
        TrainingError: data that ends, a site that no batch reaches, a loss that is not finite. The
            module then has the values of the last step that was in order, as after an interrupt.
    """

    data: Iterable[Any]
    _: KW_ONLY
    inputs: Callable[[Any], Any] | None = None
    steps: int = 200
    lr: float = 1e-2
    warmup: float = 0.1
    result: AlignResult | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive(steps=self.steps, lr=self.lr)

    @torch.inference_mode(False)
    def __call__(self, module: nn.Module, report: Report | None = None) -> None:
        batches = endless(self.data)
        module, first = self._original(module, batches)
        nodes = nodes_of(module)
        device = next(iter(nodes.values())).tensors()[0][0].device
        students = {key: _Student(key, node) for key, node in nodes.items()}
        optimizers = self._optimizers(students)
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                one, lambda step: warm_cosine(step, self.steps, self.warmup)
            )
            for one in optimizers
        ]
        self.result = result = AlignResult(losses={key: [] for key in nodes})
        start = time.perf_counter()
        with kept(module), progress("align", self.steps) as advance:
            module.eval().requires_grad_(False)
            _find_projections(module, students, *self._call(first, device))
            result.measured = {key: s.projection for key, s in students.items()}
            try:
                for step in range(self.steps):
                    args, kwargs = self._call(first if step == 0 else next(batches), device)
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    with _taught(students, module):
                        module(*args, **kwargs)
                    self._record(result, students, step)
                    for optimizer, schedule in zip(optimizers, schedules, strict=True):
                        optimizer.step()
                        schedule.step()
                    result.steps, result.samples = (
                        step + 1,
                        result.samples + samples((args, kwargs)),
                    )
                    advance(f"mean loss {sum(result.after.values()) / len(nodes):.3f}")
            finally:
                for student in students.values():
                    student.give_back()
                result.seconds = time.perf_counter() - start

    def _optimizers(self, students: Mapping[str, _Student]) -> list[torch.optim.Optimizer]:
        named = [pair for s in students.values() for pair in s.node.named_parameters()]
        matrices = [p for _, p in named if p.dim() == 3]
        convolutions = [p for _, p in named if p.dim() != 3]
        optimizers: list[torch.optim.Optimizer] = [Muon(matrices, self.lr, momentum=0.9)]
        if convolutions:
            rate = 2 * self.lr
            adam = torch.optim.AdamW(convolutions, rate, betas=(0.9, 0.95), weight_decay=0.0)
            optimizers.append(adam)
        return optimizers

    def _original(self, module: nn.Module, batches: Iterator[Any]) -> tuple[nn.Module, Any]:
        """The linearized form of what is to be aligned, on the same new parameters, and a batch.

        A model that was compiled without being linearized is linearized here.
        """
        first = next(batches)
        module = getattr(module, "_orig_mod", module)
        if is_linearized(module):
            return module, first
        nodes_of(module)  # an error, where there is nothing to train
        new = adapter(module)
        device = next(new.parameters()).device
        template = bare(duplicate(module, share=True)).eval()
        args, kwargs = self._call(first, device)
        config = new.linearize_config
        return build(template, args, kwargs, config, new.nodes(), inplace=True), first

    def _call(self, batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return as_call(batch if self.inputs is None else self.inputs(batch), device)

    def _record(self, result: AlignResult, students: Mapping[str, _Student], step: int) -> None:
        losses = torch.stack([s.take_loss() for s in students.values()]).tolist()
        for (key, values), loss in zip(result.losses.items(), losses, strict=True):
            if not loss < float("inf"):
                raise TrainingError(
                    f"'{key}': expected a finite loss, got {loss} at step {step}: lower lr "
                    f"({self.lr}), or look for inputs that are not finite; the values are those "
                    f"of the step before"
                )
            values.append(loss)


class _Student:
    """The float32 copy of a node that is trained in its place."""

    def __init__(self, key: str, node: TTT) -> None:
        self.key = key
        self.original = node
        self.node = copy.deepcopy(node).float().requires_grad_(True)
        self.projection = ""
        self.weight: Tensor | None = None
        self.merged: Tensor | None = None
        self.losses: list[Tensor] = []

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        """What the original does here, and kept to find out who reads it."""
        out = functional.scaled_dot_product_attention(q, k, v, scale=self.node.scale)
        self.merged = _merge_heads(out)
        return out

    def learn(self, q: Tensor, k: Tensor, v: Tensor, *layout: Any, **named: Any) -> Tensor:
        """The same, and the gradients of the student's loss on it."""
        out = functional.scaled_dot_product_attention(q, k, v, scale=self.node.scale)
        wanted = _merge_heads(out).float()
        with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            got = self.node(q.float(), k.float(), v.float(), *layout, **named)
            error = _merge_heads(got) - wanted
            if self.weight is not None:
                error, wanted = error @ self.weight.mT, wanted @ self.weight.mT
            tiny = torch.finfo(torch.float32).tiny
            loss = error.square().sum() / wanted.square().sum().clamp_min(tiny)
            loss.backward()
        self.losses.append(loss.detach())
        return out

    def take_loss(self) -> Tensor:
        if not self.losses:
            raise TrainingError(
                f"'{self.key}' did not run: expected batches for which every rewritten attention "
                f"runs, as in the call that the model was linearized for"
            )
        losses, self.losses = self.losses, []
        return torch.stack(losses).mean()

    @torch.no_grad()
    def give_back(self) -> None:
        """The trained values to the node itself, in its dtype."""
        trained = dict(self.node.named_parameters())
        for name, parameter in self.original.named_parameters():
            parameter.copy_(trained[name])


def _merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, Dv] to [B, N, H*Dv]."""
    return x.transpose(1, 2).flatten(2)


@contextmanager
def _instead(
    nodes: Mapping[str, TTT], forward: Mapping[str, Callable[..., Tensor]]
) -> Iterator[None]:
    """The nodes compute something else meanwhile."""
    try:
        for key, node in nodes.items():
            node.forward = forward[key]  # type: ignore[method-assign]
        yield
    finally:
        for node in nodes.values():
            vars(node).pop("forward", None)


@contextmanager
def _taught(students: Mapping[str, _Student], module: nn.Module) -> Iterator[None]:
    """`module` is the original meanwhile, and each of its sites teaches a student."""
    nodes = {key: s.original for key, s in students.items()}
    with torch.no_grad(), _instead(nodes, {key: s.learn for key, s in students.items()}):
        yield


@torch.no_grad()
def _find_projections(
    module: nn.Module, students: Mapping[str, _Student], args: Any, kwargs: Any
) -> None:
    """Find the linear layer that reads each attention's output and nothing else, by running it.

    It is a module inside the attention's owner with a weight [C, H*Dv] whose input is that very
    output, heads merged.
    """
    handles = []
    for key, student in students.items():
        owner = key.rpartition(".")[0]
        width = student.node.num_heads * student.node.value_dim
        inside = module.get_submodule(owner) if owner else module
        for name, candidate in inside.named_modules():
            weight = candidate._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and weight.shape[1] == width:
                handles.append(
                    candidate.register_forward_pre_hook(
                        _Compare(student, f"{owner}.{name}".strip("."), weight)
                    )
                )
    nodes = {key: s.original for key, s in students.items()}
    try:
        with _instead(nodes, {key: s.softmax for key, s in students.items()}):
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for student in students.values():
            student.merged = None


class _Compare:
    """A forward pre-hook: is what this layer reads the attention's output?"""

    def __init__(self, student: _Student, name: str, weight: Tensor) -> None:
        self.student, self.name, self.weight = student, name, weight

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        merged = self.student.merged
        read = next((a for a in args if isinstance(a, Tensor)), None)
        if merged is None or read is None or read.numel() != merged.numel():
            return
        if torch.equal(read.reshape(merged.shape), merged.to(read.dtype)):
            self.student.projection = self.name
            self.student.weight = self.weight.detach().float()
            self.student.merged = None
