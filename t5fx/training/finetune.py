"""`FineTune`: a thin training loop for linearized models, on Hugging Face's accelerate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t5fx.errors import TrainingError
from t5fx.reports import Report
from t5fx.training.loop import Loop
from t5fx.training.state import FineTuneResult as FineTuneResult

#: "freeze" trains the new parameters only, "full" the others too.
PROTOCOLS = ("freeze", "full")


@dataclass
class FineTune(Loop):
    """A fine-tune hook: train a linearized model on a loss.

    By default it uses AdamW with a linear warm-up, a cosine and clipped gradients. It runs on
    accelerate, which places the model, splits the batches of a DataLoader over processes and
    averages gradients. In a training script of your own, `t5fx.param_groups` and `t5fx.freeze` give
    any optimizer the same parameters.

    Use it as a hook, `linearize(model, args, finetune=FineTune(loader, loss))`, or call it with a
    model that is linearized or compiled with backend="t5", `FineTune(loader, loss)(fast)`.
    Parameters are trained in place; afterwards `.result` has the history.

    Under torchrun or `accelerate launch` every process makes the same call with the same data. A
    model that FSDP2 has sharded (`torch.distributed.fsdp.fully_shard`) is trained as it is, any
    other model under DDP.

    Args:
        data: batches, iterated as often as needed: a DataLoader, or a list. Of what is no
            DataLoader each of several processes takes every so many-th batch.
        loss: (model, batch) -> a tensor with one number, such as
            `lambda model, batch: cross_entropy(model(batch[0]), batch[1])`.
        protocol: "freeze" trains only the new parameters, with the model in eval mode; "full" also
            trains the others, with the model in train mode. A parameter that requires no gradients
            is not trained.
        steps: number of optimizer steps.
        lr: peak learning rate of the new parameters. With "full" the others get 1/`lr_ratio` of
            it; 20 is what the method's authors use.
        weight_decay: weight decay of tensors with two or more axes.
        warmup: fraction of the steps in which the rate rises linearly.
        optimizer: (groups of `t5fx.param_groups`) -> an optimizer; None is `torch.optim.AdamW`.
        schedule: (optimizer) -> a schedule of torch.optim.lr_scheduler, stepped after each
            optimizer step; None is the linear warm-up and the cosine to almost zero.
        max_grad_norm: norm to which larger gradients are scaled down; None leaves them as they are.
        evaluate: (model) -> metrics by name, called in eval mode without gradients every
            `eval_every` steps (only after the last step if that is None) and after the last step.
            With several processes, the history has the mean of theirs.
        log_every: number of steps that an entry of `.result.history` sums up.
        on_step: called after each step with its number, from 1, and {"loss", "grad_norm", "lr"}.
        ema: decay of an exponential moving average of the trained parameters, such as 0.999, by
            torch.optim.swa_utils. `evaluate` gets the average, and the module has its values at the
            end.
        checkpoint: folder to which the state is saved every `save_every` steps and after the last
            one, by accelerate's `save_state`. If the folder has the state of a training with the
            same settings, training resumes from it and ends with the same bits on a CPU. The state
            contains the optimizer, schedule, average, history, random numbers and the position in
            the data, which `t5fx.training.batches` describes. The folder stays at the end; delete
            it to train anew.
        accelerator: an Accelerator with settings of your own (mixed precision, gradient
            accumulation, trackers). By default it is one on the device of the model. The objects
            that it prepared before are released.

    Raises:
        TrainingError: there is nothing to train, parameters have 16 bits, the data ends, the loss
            is not a number, or a loss or a gradient is not finite; the module then has the values
            of the last valid step. A checkpoint is damaged or has other settings. A sharded model
            has parameters that are not sharded. accelerate does not see all processes, or the
            accelerator splits models in another way than DDP.
    """

    loss: Callable[[nn.Module, Any], Tensor]
    protocol: str = "freeze"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise TrainingError(
                f"protocol: expected one of {', '.join(PROTOCOLS)}, got {self.protocol!r}"
            )
        super().__post_init__()

    @torch.inference_mode(False)
    def __call__(self, module: nn.Module, report: Report | None = None) -> None:
        full = self.protocol == "full"
        self.run(module, self.loss, frozen=not full, training=full)
