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

    AdamW; linear warm-up, then a cosine; gradients clipped; on accelerate, which places the model,
    splits the batches of a DataLoader over processes and averages gradients. In a training script
    of your own, `t5fx.param_groups` and `t5fx.freeze` give any optimizer what this one gets.

    As a hook: `linearize(model, args, finetune=FineTune(loader, loss))`; or called with a
    linearized model, or one compiled with backend="t5": `FineTune(loader, loss)(fast)`.
    Parameters are trained in place; afterwards `.result` has the history.

    Under torchrun or `accelerate launch` every process calls it with the same data. A model that
    FSDP2 has sharded (`torch.distributed.fsdp.fully_shard`) is trained as it is, any other under
    DDP.

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
        weight_decay: for tensors of two or more axes.
        warmup: fraction of the steps.
        optimizer: (groups of `t5fx.param_groups`) -> an optimizer; None is `torch.optim.AdamW`.
        schedule: (optimizer) -> a schedule of torch.optim.lr_scheduler, stepped after each
            optimizer step; None is the linear warm-up and the cosine to almost zero.
        max_grad_norm: gradients are scaled down to this norm, if it is not None.
        evaluate: (model) -> metrics by name, called in eval mode without gradients every
            `eval_every` steps (never in between where that is None) and after the last; of several
            processes the history has the mean.
        log_every: steps of an interval of `.result.history`.
        on_step: called after each step with its number, from 1, and {"loss", "grad_norm", "lr"}.
        ema: decay of an exponential moving average of the trained parameters, such as 0.999, by
            torch.optim.swa_utils; `evaluate` sees it, and it is what the module has at the end.
        checkpoint: a folder that keeps the state every `save_every` steps and after the last, by
            accelerate's `save_state`. A call that finds one there, with the same settings on the
            same model, goes on from it, to the same bits on a CPU: optimizer, schedule, average,
            history, random numbers and the place in the data, which `t5fx.training.batches`
            describes. It stays there at the end; delete it to train anew.
        accelerator: with your own settings (mixed precision, gradient accumulation, trackers are
            logged to). By default one on the device where the model is. It releases what it
            prepared before.

    Raises:
        TrainingError: nothing to train, parameters in 16 bits, data that ends, a loss that is no
            number, a loss or a gradient that is not finite. The module then has the values of the
            last step that was in order. A checkpoint that is damaged, or of other settings; a
            sharded model with parameters that nobody averages; processes that accelerate does not
            see, or an accelerator that splits models in other ways than DDP.
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
