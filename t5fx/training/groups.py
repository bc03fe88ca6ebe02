"""Which parameters are new, and how an optimizer treats them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from t5fx.errors import TrainingError
from t5fx.training.nodes import check_not_negative, check_positive, nodes_of
from t5fx.wrappers import uncompiled

M = TypeVar("M", bound=nn.Module)


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    lr_ratio: float = 20.0,
    weight_decay: float = 0.0,
    no_decay: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """The parameters that require gradients, as groups for any torch optimizer.

    The new ones, those of the TTT nodes, and the model's own, each with weight decay and without::

        optimizer = torch.optim.AdamW(t5fx.param_groups(lin, 1.6e-3, weight_decay=0.05))

    Args:
        model: a linearized one, one compiled with backend="t5", or the torch.compile of either.
        lr: of the new parameters; the others get `lr / lr_ratio`. The method's authors use 20
            (arXiv 2605.02772).
        weight_decay: of those with two axes or more that `no_decay` does not name.
        no_decay: names or fnmatch patterns of names, such as "*.t5.*"; by default what the model's
            `no_weight_decay()` says, which timm's models have.

    Returns:
        Groups that are not empty, of "params", "lr", "weight_decay" and "name", which is
        "new", "new, no decay", "old" or "old, no decay".

    Raises:
        TrainingError: no node in the model, nothing that requires gradients, or a wrong number.
    """
    check_positive(lr=lr, lr_ratio=lr_ratio)
    check_not_negative(weight_decay=weight_decay)
    inner = uncompiled(model)
    fresh = {
        f"{key}.{name}": parameter
        for key, node in nodes_of(model).items()
        for name, parameter in node.named_parameters()
    }
    known = {id(parameter) for parameter in fresh.values()}
    old = {name: p for name, p in inner.named_parameters() if id(p) not in known}
    if no_decay is None:
        asked = getattr(inner, "no_weight_decay", None)
        no_decay = asked() if callable(asked) else ()
    patterns = [no_decay] if isinstance(no_decay, str) else list(no_decay)
    groups = []
    for kind, parameters, rate in (("new", fresh, lr), ("old", old, lr / lr_ratio)):
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                spared = parameter.dim() < 2 or any(fnmatchcase(name, p) for p in patterns)
                (others if spared else decayed).append(parameter)
        for name, chosen, decay in (
            (kind, decayed, weight_decay),
            (f"{kind}, no decay", others, 0.0),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay, "name": name})
    if not groups:
        raise TrainingError(
            "nothing to train: expected parameters that require gradients, got a model all of "
            "which is frozen"
        )
    return groups


def freeze(model: M) -> M:
    """Let only the new parameters, those of the TTT nodes, require gradients.

    Returns the model. New parameters that were frozen before stay frozen; train and eval mode are
    left as they are.

    Raises:
        TrainingError: no node in the model.
    """
    known = {id(p) for node in nodes_of(model).values() for p in node.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in known:
            parameter.requires_grad_(False)
    return model
