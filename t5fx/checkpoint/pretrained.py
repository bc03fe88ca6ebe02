"""`save_pretrained` and `from_pretrained`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from t5fx.api import check_call, refuse_linearized
from t5fx.backend.adapters import Parameters, adapter
from t5fx.checkpoint.files import (
    CALLABLE,
    CONFIG_NAME,
    Checkpoint,
    Description,
    check_shape,
    differences,
    site_of,
    write,
)
from t5fx.config import LinearizeConfig
from t5fx.errors import CheckpointError
from t5fx.frontend.copies import duplicate
from t5fx.kernels import TTT
from t5fx.kernels.module import SETTINGS
from t5fx.pipeline import with_nodes
from t5fx.rewrite.sites import parameter_dtype
from t5fx.runtime.lookup import configs, nodes_in

M = TypeVar("M", bound=nn.Module)

#: The arguments of a node that are kept with it; its name, dtype and device are the model's.
_SETTINGS = ("num_heads", "head_dim", "value_dim", "grid_ndim", *SETTINGS, "seed")


def save_pretrained(
    lin: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_only: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Save a linearized model as safetensors files and a JSON file, without pickle.

    The directory then has what `from_pretrained` needs besides the original model's code. A
    checkpoint that was in it is replaced at once, when the new one is complete; a save that fails
    leaves it as it was.

    Args:
        lin: what `linearize` returned, or torch.compile made of it. A model that was compiled with
            backend="t5" without being linearized, or its `t5fx.adapter`, is saved the same way.
        directory: made where it does not exist.
        adapter_only: save the new parameters only (every key under a `.t5`).
        state_dict: what to save instead of `lin.state_dict()`, of a model that FSDP has split:
            `torch.distributed.checkpoint.state_dict.get_model_state_dict` with
            `StateDictOptions(full_state_dict=True)`. Save from one process.
        shard_bytes: how large a file may become; larger models are cut into several.

    Raises:
        CheckpointError: `lin` has no TTT nodes, or a tensor without values or split over devices.
    """
    lin = getattr(lin, "_orig_mod", lin)
    nodes, config = _nodes_of(lin)
    tensors = dict(_whole_state(lin, nodes) if state_dict is None else state_dict)
    if adapter_only or isinstance(lin, Parameters):
        tensors = {name: t for name, t in tensors.items() if site_of(name, nodes) is not None}
    _check_values(tensors)
    for key, node in nodes.items():
        expected = {f"{key}.{name}" for name in node.state_dict()}
        if not expected <= set(tensors):
            raise CheckpointError(
                f"state_dict: expected the parameters of every node, "
                f"{differences(expected, tensors)}"
            )
    description = Description(
        content="adapter" if adapter_only or isinstance(lin, Parameters) else "model",
        model=type(lin).__name__,
        config=config.to_dict(callables=CALLABLE),
        sites={k: {name: getattr(n, name) for name in _SETTINGS} for k, n in nodes.items()},
        made_with={"torch": torch.__version__},
    )
    write(Path(directory), tensors, description, shard_bytes)


def _nodes_of(lin: nn.Module) -> tuple[dict[str, TTT], LinearizeConfig]:
    config = next(configs(lin), None)
    if config is not None:
        return nodes_in(lin), config
    if not isinstance(lin, Parameters):
        lin = adapter(lin)
    return lin.nodes(), lin.linearize_config


def _whole_state(lin: nn.Module, nodes: Mapping[str, TTT]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = dict(lin.state_dict())
    for key, node in nodes.items():  # those of an untouched compiled model are beside it
        state |= {f"{key}.{name}": t for name, t in node.state_dict().items()}
    return state


def _check_values(tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"state_dict: expected tensors, got a {type(tensor).__name__} for '{name}': what "
                f"get_extra_state returns has no place in a checkpoint without pickle"
            )
        if type(tensor).__name__ == "DTensor":
            raise CheckpointError(
                f"'{name}' is split over devices (a DTensor): pass state_dict=, as "
                f"torch.distributed.checkpoint.state_dict.get_model_state_dict gives it with "
                f"StateDictOptions(full_state_dict=True)"
            )
        if tensor.is_meta:
            raise CheckpointError(f"'{name}' has no values: it is on the meta device")


@torch.inference_mode(False)
def from_pretrained(
    directory: str | os.PathLike[str],
    model: M,
    *,
    config: LinearizeConfig | None = None,
    inplace: bool = False,
    device: torch.device | str = "cpu",
) -> M:
    """Linearize a model as a saved one was, and give it the saved values.

    Everything is checked before anything is loaded: that the files are those that were written,
    that names and shapes are the model's, that every saved site has an owner in it. The first call
    of the model is then judged as `linearize` judges its example.

    Args:
        directory: what `save_pretrained` wrote, adapter or whole.
        model: the original, of the class and configuration that were linearized. It gives the
            code, dtypes and devices; from a whole checkpoint come all values, from an adapter the
            new ones only. Parameters may be on the meta device (a whole checkpoint then gives
            them): build it with `accelerate.init_empty_weights()`, which leaves buffers their
            values.
        config: instead of the saved one, to change what does not change the nodes (`grid`,
            `impl`); needed where the saved one had callables.
        inplace: change the model that is given, instead of a copy of it.
        device: where parameters go that were on the meta device.

    Returns:
        What `linearize` returned before it was saved.

    Raises:
        CheckpointError: names the file, tensor, shape, version or site that is not as expected.
        RefusedCallError, CaptureError: in the first call of the result, where the model has other
            attention than the one that was saved.
    """
    check_call(model, (), None)
    refuse_linearized(model)
    folder = Path(directory)
    checkpoint = Checkpoint(folder)
    chosen = config or checkpoint.config()
    nodes = _checked_nodes(checkpoint, model)
    _check_originals(model, checkpoint)

    result = model if inplace else duplicate(model)
    device = torch.device(device)
    _fill_meta(result, device)
    with torch.no_grad():
        originals = result.state_dict(keep_vars=True)
        for name, value in checkpoint.tensors(lambda name: checkpoint.site(name) is None):
            originals[name].copy_(value)
        new = dict(checkpoint.tensors(lambda name: checkpoint.site(name) is not None))
        for key, node in nodes.items():
            values = {n: new[f"{key}.{n}"] for n in node.state_dict()}
            _place(node, key, result, device, next(iter(values.values())).dtype)
            node.load_state_dict(values)
    made: Any = with_nodes(result, chosen, nodes)
    return made  # type: ignore[no-any-return]


def _checked_nodes(checkpoint: Checkpoint, model: nn.Module) -> dict[str, TTT]:
    """A node on the meta device for each saved site, whose tensors are there in its shapes."""
    where, about = checkpoint.folder / CONFIG_NAME, checkpoint.description
    nodes: dict[str, TTT] = {}
    for key, settings in about.sites.items():
        try:
            model.get_submodule(key.rpartition(".")[0])
        except AttributeError as error:
            raise CheckpointError(
                f"'{checkpoint.folder}' has a node '{key}': expected its owner in "
                f"{type(model).__name__}, found no such module"
            ) from error
        try:
            nodes[key] = TTT(**settings, name=key, device="meta")
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"'{where}': site '{key}' has bad settings: {error}") from error
    expected = {
        f"{k}.{n}": t.shape for k, node in nodes.items() for n, t in node.state_dict().items()
    }
    stored = {name for name in checkpoint.shapes if checkpoint.site(name) is not None}
    if stored != set(expected):
        raise CheckpointError(
            f"'{where}': expected the parameters of {len(nodes)} nodes, "
            f"{differences(expected, stored)}"
        )
    for name, shape in expected.items():
        check_shape(name, shape, checkpoint.shapes[name], checkpoint.folder)
    return nodes


def _check_originals(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Whether the checkpoint's other tensors are those of the model, in its shapes."""
    stored = {name for name in checkpoint.shapes if checkpoint.site(name) is None}
    state = model.state_dict()
    content, folder = checkpoint.description.content, checkpoint.folder
    if content == "model" and stored != set(state):
        raise CheckpointError(
            f"'{folder}' and {type(model).__name__} have different tensors: the model's, "
            f"{differences(state, stored)}"
        )
    if content == "adapter" and stored:
        raise CheckpointError(
            f"'{folder}': expected parameters of TTT nodes only in an adapter, "
            f"{differences((), stored)}"
        )
    for name in stored:
        check_shape(name, state[name].shape, checkpoint.shapes[name], folder)
    if content == "model":
        state = {n: b for n, b in model.named_buffers() if n not in state}
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"expected values of {', '.join(map(repr, empty[:5]))}, which the checkpoint does not "
            f"have, got tensors on the meta device: build the model with "
            f"accelerate.init_empty_weights(), which leaves buffers on the CPU"
        )


def _fill_meta(template: nn.Module, device: torch.device) -> None:
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


def _place(
    node: TTT, key: str, template: nn.Module, device: torch.device, saved: torch.dtype
) -> None:
    """Give a node memory, on the device and in the dtype of its owner's parameters."""
    owner = key.rpartition(".")[0]
    first = next(template.get_submodule(owner).parameters(), None)
    node.to_empty(device=device if first is None else first.device)
    node.to(parameter_dtype(template, owner, saved))
