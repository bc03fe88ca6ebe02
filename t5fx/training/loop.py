"""The training loop of `FineTune` and `Distill`, on Hugging Face's accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from t5fx.errors import TrainingError
from t5fx.training.batches import Batches, placed, samples
from t5fx.training.groups import freeze, param_groups
from t5fx.training.nodes import (
    check_count,
    check_not_negative,
    check_positive,
    check_share,
    device_of,
    kept,
    progress,
    warm_cosine,
)
from t5fx.training.processes import accelerator_on, averaged
from t5fx.training.sharding import check_sharding, is_sharded, whole
from t5fx.training.state import Average, FineTuneResult, TrainingState, registered, resume, save
from t5fx.wrappers import uncompiled

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[nn.Module, Any], Tensor]
#: Settings that a training has in common with one that it goes on with.
_SETTINGS = (
    *("steps", "lr", "lr_ratio", "weight_decay", "warmup", "max_grad_norm", "log_every"),
    *("eval_every", "ema"),
)


@dataclass
class Loop:
    """Options of a training, and the loop itself. See `FineTune` for what they mean."""

    data: Iterable[Any]
    _: KW_ONLY
    steps: int = 1000
    lr: float = 3e-4
    lr_ratio: float = 20.0
    weight_decay: float = 0.01
    warmup: float = 0.05
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    max_grad_norm: float | None = 1.0
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    eval_every: int | None = None
    log_every: int = 50
    on_step: Callable[[int, dict[str, float]], object] | None = None
    ema: float | None = None
    checkpoint: str | Path | None = None
    save_every: int = 100
    accelerator: Accelerator | None = None
    result: FineTuneResult | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 < self.ema < 1:
            raise TrainingError(f"ema: expected a decay between 0 and 1, got {self.ema!r}")
        most = 1.0 if self.max_grad_norm is None else self.max_grad_norm
        check_positive(lr=self.lr, lr_ratio=self.lr_ratio, max_grad_norm=most)
        evaluated = 1 if self.eval_every is None else self.eval_every
        check_count(steps=self.steps, log_every=self.log_every, eval_every=evaluated)
        check_count(save_every=self.save_every)
        check_not_negative(weight_decay=self.weight_decay)
        check_share(warmup=self.warmup)

    def run(self, module: nn.Module, loss: Loss, *, frozen: bool, training: bool) -> None:
        """Train a module on a loss, in place.

        frozen: the new parameters only; training: in train mode.
        """
        accelerator = accelerator_on(device_of(module), self.accelerator)
        _check_kind(accelerator, module)
        self.result = FineTuneResult()
        with kept(module):
            if frozen:
                freeze(module)
            module.train(training)
            check_sharding(module)
            groups = param_groups(
                module, self.lr, lr_ratio=self.lr_ratio, weight_decay=self.weight_decay
            )
            _check_wide(groups)
            made = (self.optimizer or torch.optim.AdamW)(groups)
            made.zero_grad()
            schedule = (self.schedule or self._warm_cosine)(made)
            model, optimizer = _prepared(accelerator, module, made)
            if isinstance(self.data, DataLoader):
                batches = Batches(accelerator.prepare(self.data), accelerator.skip_first_batches)
            else:
                batches = Batches(self.data)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            state = TrainingState(
                folder=self.checkpoint,
                settings={name: getattr(self, name) for name in _SETTINGS} | {"frozen": frozen},
                module=uncompiled(module),
                optimizer=optimizer,
                schedule=schedule,
                average=Average(trained, self.ema),
                batches=batches,
                result=self.result,
            )
            try:
                with registered(accelerator, state):
                    self._train(accelerator, model, loss, state)
            finally:
                accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def _warm_cosine(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warm_cosine(step, self.steps, self.warmup)
        )

    def _train(
        self, accelerator: Accelerator, model: nn.Module, loss: Loss, state: TrainingState
    ) -> None:
        result, optimizer = state.result, state.optimizer
        if self.checkpoint is not None:
            resume(accelerator, Path(self.checkpoint))
        start = time.perf_counter() - result.seconds
        with state.average, progress("fine-tune", self.steps, result.steps) as advance:
            while result.steps < self.steps:
                numbers = self._step(accelerator, model, loss, state)
                numbers["lr"] = optimizer.param_groups[0]["lr"]
                if not optimizer.step_was_skipped:  # by a scaler for float16
                    state.schedule.step()
                    state.average.update()
                result.steps += 1
                result.seconds = time.perf_counter() - start
                state.interval.append(numbers)
                self._record(accelerator, model, state)
                advance(f"loss {numbers['loss']:.4g}")
                if self.on_step is not None:
                    self.on_step(result.steps, numbers)
                due = result.steps == self.steps or result.steps % self.save_every == 0
                if self.checkpoint is not None and due:
                    save(accelerator, Path(self.checkpoint), state)

    def _step(
        self, accelerator: Accelerator, model: nn.Module, loss: Loss, state: TrainingState
    ) -> dict[str, float]:
        """One step of the optimizer, on as many batches as gradients are accumulated of."""
        losses, norm = list[float](), 0.0
        most = math.inf if self.max_grad_norm is None else self.max_grad_norm
        trained = state.average.parameters
        while True:
            batch = placed(next(state.batches), accelerator.device)
            with accelerator.accumulate(model):
                value = _checked(loss(model, batch))
                losses.append(float(accelerator.reduce(value.detach(), "mean")))
                self._check_finite(losses[-1], state.result.steps)
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients(state.optimizer)
                    norm = float(whole(accelerator.clip_grad_norm_(trained, most)))
                    if accelerator.scaler is None:  # a scaler leaves such steps out
                        _check_norm(norm, state.result.steps)
                state.optimizer.step()
                state.optimizer.zero_grad()
            state.result.samples += samples(batch) * accelerator.num_processes
            if accelerator.sync_gradients:
                return {"loss": sum(losses) / len(losses), "grad_norm": norm}

    def _record(self, accelerator: Accelerator, model: nn.Module, state: TrainingState) -> None:
        """Add to the history, where an interval has ended."""
        result, last = state.result, state.result.steps == self.steps
        evaluated = last or result.steps % (self.eval_every or self.steps) == 0
        if not (last or evaluated or result.steps % self.log_every == 0):
            return
        record = {"step": result.steps, "samples": result.samples, "lr": state.interval[-1]["lr"]}
        for name in ("loss", "grad_norm"):
            record[name] = sum(one[name] for one in state.interval) / len(state.interval)
        record["seconds"] = result.seconds
        state.interval.clear()
        if evaluated and self.evaluate is not None:
            with state.average.shown(), kept(model), torch.no_grad():
                found = {n: float(v) for n, v in self.evaluate(model.eval()).items()}
            if accelerator.num_processes > 1:
                values = torch.tensor(
                    list(found.values()), dtype=torch.float64, device=accelerator.device
                )
                found = dict(zip(found, averaged(values).tolist(), strict=True))
            record |= found
        result.history.append(record)
        accelerator.log({n: v for n, v in record.items() if n != "step"}, result.steps)

    def _check_finite(self, loss: float, step: int) -> None:
        """Raise for a loss that is not finite, in every process."""
        if not math.isfinite(loss):
            raise TrainingError(
                f"expected a finite loss, got {loss} at step {step}: lower lr ({self.lr}), "
                f"or look for inputs that are not finite; the model has the values of the step "
                f"before"
            )


def _prepared(accelerator: Accelerator, module: nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """The model as accelerate wants it for training, and its optimizer."""
    if is_sharded(module):
        # Its gradients are averaged already: of accelerate it gets mixed precision, and no DDP.
        model = accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
        return model, accelerator.prepare(optimizer)
    model, prepared = accelerator.prepare(module, optimizer)
    return model, prepared


def _check_kind(accelerator: Accelerator, module: nn.Module) -> None:
    """Raise for what splits a model in other ways than `fully_shard`, or scales its gradients."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise TrainingError(
            f"accelerator: expected one of one process or of DDP, got one of {kind}: shard the "
            f"model with torch.distributed.fsdp.fully_shard and give an Accelerator without "
            f"plugins, or use t5fx.param_groups in a loop of your own"
        )
    if accelerator.scaler is not None and is_sharded(module):
        raise TrainingError(
            "accelerator: expected mixed_precision 'bf16' or 'no' for a model that FSDP2 has "
            "sharded, got 'fp16', whose scale each process would choose for itself"
        )


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TrainingError(f"loss: expected a tensor with one number, got {got}")
    if not loss.requires_grad:
        raise TrainingError(
            "loss: expected a tensor with gradients to the new parameters, got one without: "
            "is it computed from the model's output, outside of torch.no_grad?"
        )
    return loss.reshape(())


def _check_norm(norm: float, step: int) -> None:
    if not math.isfinite(norm):
        raise TrainingError(
            f"expected finite gradients, got a norm of {norm} at step {step} with a finite loss: "
            f"look for a division by zero or a root of zero behind the loss; the model has the "
            f"values of the step before"
        )


def _check_wide(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise for parameters in which the steps of an optimizer are rounded away."""
    for group in groups:
        for parameter in group["params"]:
            if parameter.dtype in (torch.float16, torch.bfloat16):
                name = str(parameter.dtype).removeprefix("torch.")
                raise TrainingError(
                    f"expected parameters in float32, got {name}, whose rounding errors are larger "
                    f"than most of the optimizer's steps: train model.float() with "
                    f"accelerator=Accelerator(mixed_precision='bf16'), and convert it afterwards"
                )
