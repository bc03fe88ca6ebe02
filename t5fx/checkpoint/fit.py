"""Whether a checkpoint and a model fit each other."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from t5fx.checkpoint.files import Checkpoint, check_shape, differences
from t5fx.errors import CheckpointError
from t5fx.kernels import TTT
from t5fx.wrappers import module_at, plain_name


def fitting_nodes(checkpoint: Checkpoint, model: nn.Module) -> dict[str, TTT]:
    """By key, a node on the meta device for each saved site, whose tensors are there in its shapes.

    Tensors of a checkpoint that a library saved under other names than the model's are renamed.
    """
    nodes: dict[str, TTT] = {}
    expected: dict[str, torch.Size] = {}
    for key, settings in checkpoint.description.sites.items():
        try:
            module_at(model, key.rpartition(".")[0])
        except AttributeError as error:
            raise CheckpointError(
                f"'{checkpoint.folder}' has a node '{key}': expected its owner in "
                f"{type(model).__name__}, found no such module"
            ) from error
        try:
            node = TTT(**settings, name=key, device="meta")
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"'{checkpoint.where}': site '{key}' has bad settings: {error}"
            ) from error
        nodes[key] = node
        expected |= {f"{key}.{name}": tensor.shape for name, tensor in node.state_dict().items()}
    if checkpoint.library:
        _rename(checkpoint, model, {*expected, *map(plain_name, model.state_dict())})
    stored = {name for name in checkpoint.shapes if checkpoint.site(name) is not None}
    if stored != set(expected):
        raise CheckpointError(
            f"'{checkpoint.where}': expected the parameters of {len(nodes)} nodes, "
            f"{differences(expected, stored)}{_advice(checkpoint)}"
        )
    for name, shape in expected.items():
        check_shape(name, shape, checkpoint.shapes[name], checkpoint.folder)
    return nodes


def _rename(checkpoint: Checkpoint, model: nn.Module, names: Iterable[str]) -> None:
    """Undo that transformers saves many models under the names that they had in its first version.

    Its own function is asked under which name it saves each tensor.
    """
    library = sys.modules.get("transformers.modeling_utils")
    names = set(names)
    if (
        library is None
        or not isinstance(model, library.PreTrainedModel)
        or not (names - set(checkpoint.shapes))
    ):
        return
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 the names are the model's
        return
    marks = {name: torch.empty(0) for name in names}
    own = {id(mark): name for name, mark in marks.items()}
    saved = revert_weight_conversion(model, marks)
    checkpoint.rename({name: own[id(mark)] for name, mark in saved.items() if id(mark) in own})


def check_originals(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Whether the checkpoint's other tensors are those of the model, in its shapes."""
    stored = {name for name in checkpoint.shapes if checkpoint.site(name) is None}
    state = {plain_name(n): t for n, t in model.state_dict(keep_vars=True).items()}
    content, folder = checkpoint.description.content, checkpoint.folder
    present = {id(state[name]) for name in stored if name in state}
    wanted = {name for name, tensor in state.items() if name in stored or id(tensor) not in present}
    if content == "model" and stored != wanted:
        raise CheckpointError(
            f"'{folder}' and {type(model).__name__} have different tensors: the model's, "
            f"{differences(wanted, stored)}{_advice(checkpoint, *wanted ^ stored)}"
        )
    if content == "adapter" and stored:
        raise CheckpointError(
            f"'{folder}': expected parameters of TTT nodes only in an adapter, "
            f"{differences((), stored)}"
        )
    for name in stored:
        check_shape(name, state[name].shape, checkpoint.shapes[name], folder)
    if content == "model":
        state = {n: b for n, b in model.named_buffers() if plain_name(n) not in state}
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"expected values of {', '.join(map(repr, empty[:5]))}, which the checkpoint does not "
            f"have, got tensors on the meta device: build the model with "
            f"accelerate.init_empty_weights(), which leaves buffers on the CPU"
        )


def _advice(checkpoint: Checkpoint, *names: str) -> str:
    """What to do where names differ."""
    if any(".parametrizations." in name for name in names):
        return (
            "; register on the model what was parametrized in the saved one, or save that after "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if checkpoint.library:
        return (
            f"; the model's library saved it, and {checkpoint.where.name} says so: give the model "
            f"that was saved, or save it with t5fx.save_pretrained instead"
        )
    return ""


def fill_meta(template: nn.Module, device: torch.device) -> None:
    """Give tensors on the meta device memory; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in template.modules():
        kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in kinds:
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device=device)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                    )
                tensors[name] = made[id(tensor)]
