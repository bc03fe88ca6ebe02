"""`Distill`: a whole linearized model learns to do what the original does, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn import functional

from t5fx.api import softmax
from t5fx.errors import TrainingError
from t5fx.frontend.copies import duplicate
from t5fx.kernels import TTT
from t5fx.reports import Report
from t5fx.runtime.lookup import is_linearized
from t5fx.training.loop import Loop
from t5fx.training.nodes import as_call, check_count, check_not_negative, device_of, nodes_of
from t5fx.training.sharding import is_sharded, shard_alike
from t5fx.wrappers import uncompiled

Train = Literal["new", "full", "lora"]
Loss = Callable[[Any, Any], Tensor]


def cosine(student: Any, teacher: Any) -> Tensor:
    """1 - cosine of the vectors of the last axis, the mean over all others and over all tensors."""
    return _mean(
        (1 - functional.cosine_similarity(s, t, dim=-1)).mean() for s, t in _pairs(student, teacher)
    )


def relative(student: Any, teacher: Any) -> Tensor:
    """|s - t|^2 / |t|^2 over all of a tensor, the mean over the tensors."""
    return _mean((s - t).square().sum() / t.square().sum() for s, t in _pairs(student, teacher))


#: What can be asked for by name as the loss of the outputs.
OUTPUTS: dict[str, Loss] = {"cosine": cosine, "relative": relative}


@dataclass
class Distill(Loop):
    """A fine-tune hook: train the linearized model end to end to reproduce the original.

    It needs inputs but no labels. The teacher is a copy of the model with its softmax attention put
    back; teacher and student are in eval mode. The loss is that of the outputs plus `hidden_weight`
    times the mean of |s - t|^2 / |t|^2 over the chosen hidden states (MOHAWK, arXiv 2408.10189,
    and LoLCATs, arXiv 2410.10254, align attentions, then hidden states, then outputs). `Align`
    trains each site on its own and cannot correct errors that add up over the layers; `Distill`
    does. With near attention, no `Align` is needed before it. Without, `Align` gets each site close
    at a fraction of the cost.

    Use it as a hook, `linearize(model, args, finetune=[Align(batches), Distill(batches)])`, or call
    it with a linearized model, `Distill(batches)(lin)`. Parameters are trained in place, by the
    loop of `FineTune`. Afterwards `.result` has the history.

    Args:
        data: batches, as for `Align`.
        inputs: function from a batch to the inputs of the model, as for `Align`.
        output: the loss of the outputs: "cosine", 1 - cosine of their last axis; "relative",
            |s - t|^2 / |t|^2; or a function of the student's and the teacher's output.
        hidden: names of modules, or fnmatch patterns of names, whose outputs are compared too. None
            is the blocks that contain the rewritten attentions, () is no module.
        hidden_weight: weight of the loss of the hidden states.
        train: which parameters are trained: "new" the new ones only, "full" also the old ones, at
            the rate `lr / lr_ratio`, or "lora" the new ones and low-rank updates of the linear
            layers (by peft), which are merged at the end.
        rank: rank of the low-rank updates.
        steps: as for `FineTune`.
        lr: as for `FineTune`.
        lr_ratio: as for `FineTune`.
        weight_decay: as for `FineTune`.
        warmup: as for `FineTune`.
        optimizer: as for `FineTune`.
        schedule: as for `FineTune`.
        max_grad_norm: as for `FineTune`.
        log_every: as for `FineTune`.
        on_step: as for `FineTune`.
        ema: as for `FineTune`.
        checkpoint: as for `FineTune`.
        save_every: as for `FineTune`.
        accelerator: as for `FineTune`.
        evaluate: as for `FineTune`, such as the agreement on held-out inputs.
        eval_every: as for `FineTune`.

    Raises:
        TrainingError: a hidden state does not exist, there is nothing to train, the data ends, or
            a loss is not finite. The module then has the values of the last valid step.
    """

    _: KW_ONLY
    inputs: Callable[[Any], Any] | None = None
    output: str | Loss = "cosine"
    hidden: Sequence[str] | None = None
    hidden_weight: float = 1.0
    train: Train = "full"
    rank: int = 8
    steps: int = 500
    lr: float = 1e-4
    lr_ratio: float = 10.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.train not in get_args(Train):
            wanted = ", ".join(map(repr, get_args(Train)))
            raise TrainingError(f"train: expected one of {wanted}, got {self.train!r}")
        if not callable(self.output) and self.output not in OUTPUTS:
            wanted = ", ".join(map(repr, OUTPUTS))
            raise TrainingError(
                f"output: expected one of {wanted} or a function, got {self.output!r}"
            )
        check_count(rank=self.rank)
        check_not_negative(hidden_weight=self.hidden_weight)
        super().__post_init__()

    @torch.inference_mode(False)
    def __call__(self, module: nn.Module, report: Report | None = None) -> None:
        inner = uncompiled(module)
        nodes = nodes_of(module)
        device = device_of(module)
        names = self._hidden(inner, nodes)
        sharded = is_sharded(inner)
        if sharded and self.train == "lora":
            raise TrainingError(
                'train: expected "new" or "full" of a model that FSDP2 has sharded, got "lora", '
                "whose updates FSDP2 would not shard"
            )
        # A teacher that is sharded gets parameters of its own below.
        teacher = duplicate(inner, share=sharded or self.train != "full").eval()
        flags = {id(p): p.requires_grad for p in inner.parameters()}
        teacher.requires_grad_(False)
        for parameter in inner.parameters():  # which the two may share
            parameter.requires_grad_(flags[id(parameter)])
        if sharded:
            shard_alike(teacher, inner)
            teacher.requires_grad_(False)
        with ExitStack() as stack:
            if is_linearized(teacher):
                stack.enter_context(softmax(teacher))
            if self.train == "lora":
                stack.enter_context(_low_rank(inner, nodes, self.rank))
            seen = {
                which: stack.enter_context(_watched(one, names))
                for which, one in (("student", inner), ("teacher", teacher))
            }

            def loss(model: nn.Module, batch: Any) -> Tensor:
                args, kwargs = as_call(batch, device, self.inputs)
                with torch.no_grad():
                    wanted = teacher(*args, **kwargs)
                return self._compare(model(*args, **kwargs), wanted, seen)

            self.run(module, loss, frozen=self.train == "new", training=False)

    def _hidden(self, module: nn.Module, nodes: Mapping[str, TTT]) -> list[str]:
        """The names of the modules at whose outputs student and teacher are compared."""
        if not is_linearized(module):
            if self.hidden:
                raise TrainingError(
                    "hidden: expected a linearized model, got one that was compiled without being "
                    "linearized, whose hidden states are inside of a compiled graph; use "
                    "t5fx.linearize first"
                )
            return []
        names = [name for name, _ in module.named_modules() if name]
        if self.hidden is None:
            owners = [key.rpartition(".")[0] for key in nodes]
            blocks = {owner.rpartition(".")[0] for owner in owners}
            # The block of an attention is its parent, unless that is the list of all of them.
            lists = {b for b in blocks if isinstance(_get(module, b), nn.ModuleList)}
            return sorted((blocks - lists - {""}) | {o for o in owners if _parent(o) in lists})
        found = []
        for pattern in self.hidden:
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if not matching:
                raise TrainingError(
                    f"hidden: expected names of modules such as {names[:3]}, got {pattern!r}, "
                    f"which is the name of no module"
                )
            found += matching
        return list(dict.fromkeys(found))

    def _compare(self, student: Any, teacher: Any, seen: Mapping[str, dict[str, Any]]) -> Tensor:
        output = self.output if callable(self.output) else OUTPUTS[self.output]
        loss = output(student, teacher)
        ours, theirs = (dict(seen[which]) for which in ("student", "teacher"))
        for values in seen.values():
            values.clear()
        if ours:
            both = [name for name in ours if name in theirs]
            loss = loss + self.hidden_weight * _mean(relative(ours[n], theirs[n]) for n in both)
        return loss


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _get(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name) if name else module


def _pairs(student: Any, teacher: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The floating-point tensors of two results, in float32 or wider."""
    ours, theirs = pytree.tree_leaves(student), pytree.tree_leaves(teacher)
    if len(ours) != len(theirs):
        raise TrainingError(
            f"expected as many values from the student as from the teacher, {len(theirs)}, got "
            f"{len(ours)}"
        )
    for s, t in zip(ours, theirs, strict=True):
        if isinstance(s, Tensor) and s.is_floating_point():
            wide = torch.promote_types(s.dtype, torch.float32)
            yield s.to(wide), t.to(wide)


def _mean(losses: Iterable[Tensor]) -> Tensor:
    found = list(losses)
    if not found:
        raise TrainingError("expected tensors among the results to compare, got none")
    return torch.stack(found).mean()


@contextmanager
def _watched(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What these modules return, by name, of the last call."""
    seen: dict[str, Any] = {}
    handles = []
    for name in names:

        def keep(_: nn.Module, args: Any, result: Any, name: str = name) -> None:
            seen[name] = result

        handles.append(module.get_submodule(name).register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _low_rank(module: nn.Module, nodes: Mapping[str, TTT], rank: int) -> Iterator[None]:
    """The old weights get low-rank updates meanwhile, which are merged into them at the end."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise TrainingError(
            'Distill(train="lora"): expected the package peft, found none: pip install peft'
        ) from error
    inside = tuple(f"{key}." for key in nodes)
    targets = [
        name
        for name, one in module.named_modules()
        if type(one) is nn.Linear and not name.startswith(inside)
    ]
    if not targets:
        raise TrainingError('train: expected linear layers for "lora", found none')
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    new = [(p, p.requires_grad) for node in nodes.values() for p in node.parameters()]
    module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), module)
    for parameter, learns in new:
        parameter.requires_grad_(learns)
    try:
        yield
    finally:
        for name in targets:
            layer = module.get_submodule(name)
            assert isinstance(layer, BaseTunerLayer)
            layer.merge()
            module.set_submodule(name, layer.get_base_layer())
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(flags[name])
