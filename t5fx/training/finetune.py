"""`FineTune`: a training loop for linearized models, on Hugging Face's accelerate."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from t5fx.errors import TrainingError
from t5fx.kernels import TTT
from t5fx.reports import Report
from t5fx.training.groups import freeze, param_groups
from t5fx.training.nodes import (
    check_count,
    check_not_negative,
    check_positive,
    check_share,
    device_of,
    endless,
    kept,
    nodes_of,
    placed,
    progress,
    samples,
    table,
    warm_cosine,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

#: "freeze" trains the new parameters only, "full" the others too.
PROTOCOLS = ("freeze", "full")


@dataclass
class FineTuneResult:
    """What a fine-tuning did.

    history: one record an interval, with the numbers of optimizer steps and of samples so far,
    the mean loss and gradient norm over the interval, the learning rate of the new parameters,
    seconds so far, and what `evaluate` returned, if it was called then.
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def __str__(self) -> str:
        columns = list(dict.fromkeys(name for record in self.history for name in record))
        rows = [[f"{r[c]:.4g}" if c in r else "" for c in columns] for r in self.history]
        title = f"fine-tuned in {self.steps} steps, {self.samples} samples, {self.seconds:.1f} s"
        return table(title, columns, rows)


@dataclass
class FineTune:
    """A fine-tune hook: train a linearized model on a loss.

    AdamW; linear warm-up, then a cosine; gradients clipped; on accelerate, which places the model,
    splits batches over processes (a DataLoader's) and averages gradients.

    As a hook: `linearize(model, args, finetune=FineTune(loader, loss))`; or called with a
    linearized model, or one compiled with backend="t5": `FineTune(loader, loss)(fast)`.
    Parameters are trained in place; afterwards `.result` has the history.

    Args:
        data: batches, iterated as often as needed: a DataLoader, or a list. Of what is no
            DataLoader each of several processes takes every so many-th batch.
        loss: (model, batch) -> a tensor with one number, such as
            `lambda model, batch: cross_entropy(model(batch[0]), batch[1])`.
        protocol: "freeze" trains the new parameters only, the model in eval mode; "full" the
            others too, the model in train mode. What requires no gradients is not trained.
        steps: optimizer steps.
        lr: peak learning rate of the new parameters. With "full" the others get 1/`lr_ratio` of
            it; 20 is what the method's authors use.
        weight_decay: of AdamW, for tensors of two or more axes.
        warmup: fraction of the steps.
        max_grad_norm: gradients are scaled down to this norm, if it is not None.
        evaluate: (model) -> metrics by name, called in eval mode without gradients every
            `eval_every` steps (never in between where that is None) and after the last.
        log_every: steps of an interval of `.result.history`.
        ema: decay of an exponential moving average of the trained parameters, such as 0.999, by
            torch.optim.swa_utils; `evaluate` sees it, and it is what the module has at the end.
        accelerator: with your own settings (mixed precision, gradient accumulation, trackers are
            logged to). By default one on the device where the model is.

    Raises:
        TrainingError: nothing to train, parameters in 16 bits, data that ends, a loss that is no
            number, a loss or a gradient that is not finite. The module then has the values of the
            last step that was in order.
    """

    data: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    _: KW_ONLY
    protocol: str = "freeze"
    steps: int = 1000
    lr: float = 3e-4
    lr_ratio: float = 20.0
    weight_decay: float = 0.01
    warmup: float = 0.05
    max_grad_norm: float | None = 1.0
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    eval_every: int | None = None
    log_every: int = 50
    ema: float | None = None
    accelerator: Accelerator | None = None
    result: FineTuneResult | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise TrainingError(
                f"protocol: expected one of {', '.join(PROTOCOLS)}, got {self.protocol!r}"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise TrainingError(f"ema: expected a decay between 0 and 1, got {self.ema!r}")
        check_positive(
            lr=self.lr,
            lr_ratio=self.lr_ratio,
            max_grad_norm=1.0 if self.max_grad_norm is None else self.max_grad_norm,
        )
        check_count(
            steps=self.steps,
            log_every=self.log_every,
            eval_every=1 if self.eval_every is None else self.eval_every,
        )
        check_not_negative(weight_decay=self.weight_decay)
        check_share(warmup=self.warmup)

    @torch.inference_mode(False)
    def __call__(self, module: nn.Module, report: Report | None = None) -> None:
        nodes = nodes_of(module)
        device = device_of(module, nodes)
        accelerator = self.accelerator or _accelerator(device)
        self.result = FineTuneResult()
        with kept(module):
            self._set_flags(module, nodes)
            groups = param_groups(
                module, self.lr, lr_ratio=self.lr_ratio, weight_decay=self.weight_decay
            )
            _check_wide(groups)
            optimizer = torch.optim.AdamW(groups, self.lr)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: warm_cosine(step, self.steps, self.warmup)
            )
            model, optimizer, data = accelerator.prepare(
                module, optimizer, self.data if isinstance(self.data, DataLoader) else []
            )
            if not isinstance(self.data, DataLoader):
                data = self.data
            try:
                self._train(accelerator, model, optimizer, schedule, data)
            finally:
                accelerator.unwrap_model(model, keep_fp32_wrapper=False)
                if self.accelerator is None:
                    accelerator.free_memory()

    def _set_flags(self, module: nn.Module, nodes: Mapping[str, TTT]) -> None:
        if self.protocol == "freeze":
            freeze(module).eval()
        else:
            module.train()

    def _train(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, schedule: Any, data: Any
    ) -> None:
        assert self.result is not None
        result, start, batches = self.result, time.perf_counter(), endless(data)
        if not isinstance(data, DataLoader):  # which accelerate splits
            first, count = accelerator.process_index, accelerator.num_processes
            batches = itertools.islice(batches, first, None, count)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        interval = _Interval()
        average = _Average(trained, self.ema)
        with average, progress("fine-tune", self.steps) as advance:
            while result.steps < self.steps:
                batch = placed(next(batches), accelerator.device)
                with accelerator.accumulate(model):
                    loss = self._loss(model, batch, result.steps)
                    accelerator.backward(loss)
                    norm = None
                    if accelerator.sync_gradients:
                        most = math.inf if self.max_grad_norm is None else self.max_grad_norm
                        norm = accelerator.clip_grad_norm_(trained, most)
                        self._check_norm(accelerator, norm, result.steps)
                    optimizer.step()
                    optimizer.zero_grad()
                interval.add(accelerator.reduce(loss.detach(), "mean"), norm)
                result.samples += samples(batch) * accelerator.num_processes
                if not accelerator.sync_gradients:
                    continue
                rate = optimizer.param_groups[0]["lr"]
                schedule.step()
                average.update()
                result.steps += 1
                result.seconds = time.perf_counter() - start
                advance(f"loss {interval.loss:.4g}")
                last = result.steps == self.steps
                every = self.eval_every or self.steps
                evaluated = self.evaluate is not None and (last or result.steps % every == 0)
                if not (last or evaluated or result.steps % self.log_every == 0):
                    continue
                record = {"step": result.steps, "samples": result.samples, "lr": rate}
                record |= interval.take() | {"seconds": result.seconds}
                if evaluated:
                    with average.shown():
                        record |= self._evaluate(model)
                result.history.append(record)
                accelerator.log({n: v for n, v in record.items() if n != "step"}, result.steps)

    def _loss(self, model: nn.Module, batch: Any, step: int) -> Tensor:
        loss = self.loss(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TrainingError(f"loss: expected a tensor with one number, got {got}")
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"expected a finite loss, got {loss.item()} at step {step}: lower lr ({self.lr}), "
                f"or look for inputs that are not finite; the values are those of the step before"
            )
        if not loss.requires_grad:
            raise TrainingError(
                "loss: expected a tensor with gradients to the new parameters, got one without: "
                "is it computed from the model's output, outside of torch.no_grad?"
            )
        return loss.reshape(())

    def _check_norm(self, accelerator: Accelerator, norm: Any, step: int) -> None:
        """Raise for gradients that are not finite; a scaler for float16 leaves such steps out."""
        if accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            raise TrainingError(
                f"expected finite gradients, got a norm of {float(norm)} at step {step} with a "
                f"finite loss: look for a division by zero or a root of zero behind the loss; the "
                f"values are those of the step before"
            )

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        assert self.evaluate is not None
        with kept(model), torch.no_grad():
            return {n: float(v) for n, v in self.evaluate(model.eval()).items()}


def _check_wide(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise for parameters in which the steps of an optimizer are rounded away."""
    for group in groups:
        for parameter in group["params"]:
            if parameter.dtype in (torch.float16, torch.bfloat16):
                name = str(parameter.dtype).removeprefix("torch.")
                raise TrainingError(
                    f"expected parameters in float32, got {name}, whose roundings are larger than "
                    f"most steps: train model.float() with "
                    f"accelerator=Accelerator(mixed_precision='bf16'), and convert it afterwards"
                )


class _Average:
    """The moving average of parameters; as a context, they have its values at its end."""

    def __init__(self, parameters: list[Tensor], decay: float | None) -> None:
        self.parameters, self.values = parameters, []
        if decay is not None:
            self.values = [p.detach().clone() for p in parameters]
            self.step = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        if self.values:
            self.step(self.values, [p.detach() for p in self.parameters], None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The parameters have the average's values meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for i, value in enumerate(self.values):
            kept = self.parameters[i].detach().clone()
            self.parameters[i].copy_(value)
            self.values[i] = kept


class _Interval:
    """Means of loss and gradient norm since the last record."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor | None) -> None:
        self.losses.append(loss)
        if norm is not None:
            self.norms.append(torch.as_tensor(norm).detach())

    @property
    def loss(self) -> float:
        return float(torch.stack(self.losses).mean())

    def take(self) -> dict[str, float]:
        means = {"loss": self.loss, "grad_norm": float(torch.stack(self.norms).mean())}
        self.losses, self.norms = [], []
        return means


def _accelerator(device: torch.device) -> Accelerator:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise TrainingError(
            "FineTune: expected the package accelerate, found none: pip install t5fx[train]"
        ) from error
    return Accelerator(cpu=device.type == "cpu")
