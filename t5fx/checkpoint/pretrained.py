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
from t5fx.checkpoint import hub
from t5fx.checkpoint.card import CARD, base_of, write_card
from t5fx.checkpoint.description import CONFIG_NAME, site_of
from t5fx.checkpoint.files import Checkpoint, differences
from t5fx.checkpoint.fit import check_originals, fill_meta, fitting_nodes
from t5fx.checkpoint.save import index_of, write
from t5fx.config import LinearizeConfig
from t5fx.errors import CheckpointError
from t5fx.frontend.copies import duplicate
from t5fx.kernels import TTT
from t5fx.pipeline import with_nodes
from t5fx.reports import Report
from t5fx.runtime.describe import describe, sites_of
from t5fx.runtime.lookup import configs, nodes_in, reports
from t5fx.wrappers import is_split, module_at, plain_name, unwrapped

M = TypeVar("M", bound=nn.Module)


def save_pretrained(
    lin: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_only: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
    base_model: str | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str | None:
    """Save a linearized model as safetensors files and a JSON file, without pickle.

    The directory then has what `from_pretrained` needs besides the original model's code, the index
    that Hugging Face's libraries read, and a model card, unless somebody has written one. A
    checkpoint that was in it is replaced at once, when the new one is complete; a save that fails
    or is killed leaves it as it was.

    Args:
        lin: what `linearize` returned, with wrappers around it or around modules in it (those of
            torch.compile, DDP, FSDP and activation checkpointing) or without; tensors get the
            names that they have without them. A model that was compiled with backend="t5" without
            being linearized, or its `t5fx.adapter`, is saved the same way.
        directory: made where it does not exist.
        adapter_only: save the new parameters only (every key under a `.t5`).
        state_dict: what to save instead of `lin.state_dict()`, of a model that FSDP has split:
            `torch.distributed.checkpoint.state_dict.get_model_state_dict` with
            `StateDictOptions(full_state_dict=True)`. Save from one process.
        max_shard_size: how large a file may become, in bytes or as "5GB"; larger models are cut
            into several.
        base_model: the original's repository on the Hugging Face Hub, for the model card; known
            without it where transformers or diffusers loaded the original from there.
        push_to_hub: upload the checkpoint to the Hub, too.
        repo_id: the repository there; the directory's name, in the user's own space, without it.
        private: whether a repository that is made can be seen by its owner only; as the owner has
            set it on the Hub, without it.
        token: the Hub's token, where it is not the one that `hf auth login` has stored.

    Returns:
        The address of the repository, or None where nothing is uploaded.

    Raises:
        CheckpointError: `lin` has no TTT nodes, or a tensor without values or split over devices.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused the upload; the directory is written.
    """
    if not isinstance(lin, nn.Module):
        raise CheckpointError(
            f"expected a linearized model and a directory, in this order, got a "
            f"{type(lin).__name__} for the model"
        )
    given, lin = lin, unwrapped(lin)
    nodes, config = _nodes_of(lin)
    tensors = dict(_whole_state(lin, nodes) if state_dict is None else state_dict)
    tensors = {plain_name(name): tensor for name, tensor in tensors.items()}
    if given is not lin and all(name.startswith("module.") for name in tensors):  # DDP's own state
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    _bring(lin, tensors)
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
    content = "adapter" if adapter_only or isinstance(lin, Parameters) else "model"
    description = describe(lin, nodes, config, content)
    folder = Path(directory)
    write(folder, tensors, description, max_shard_size)
    base = base_of(lin) if base_model is None else base_model
    told = next(reports(lin), None) or Report(type(lin).__name__, sites_of(nodes))
    write_card(
        folder,
        description,
        told,
        name=folder.name if repo_id is None else repo_id,
        base_model=base if hub.is_repository(base) else None,
    )
    if not push_to_hub:
        return None
    files = [CONFIG_NAME, index_of(content), CARD, *description.files]
    repository = folder.resolve().name if repo_id is None else repo_id
    return hub.push(folder, files, repository, token=token, private=private)


def _nodes_of(lin: nn.Module) -> tuple[dict[str, TTT], LinearizeConfig]:
    config = next(configs(lin), None)
    if config is not None:
        return {plain_name(key): node for key, node in nodes_in(lin).items()}, config
    if not isinstance(lin, Parameters):
        lin = adapter(lin)
    return lin.nodes(), lin.linearize_config


def _whole_state(lin: nn.Module, nodes: Mapping[str, TTT]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = dict(lin.state_dict())
    for key, node in nodes.items():  # those of an untouched compiled model are beside it
        state |= {f"{key}.{name}": t for name, t in node.state_dict().items()}
    return state


def _bring(lin: nn.Module, tensors: dict[str, Any]) -> None:
    """Put in the values that accelerate keeps elsewhere and brings when their module is called."""
    for prefix, module in lin.named_modules():
        hook = vars(module).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            kept = getattr(one, "weights_map", None) or {}
            for own in (*module._parameters, *module._buffers) if kept else ():
                name = plain_name(f"{prefix}.{own}".strip("."))
                if name in tensors and tensors[name].is_meta:
                    tensors[name] = kept[own]


def _check_values(tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"state_dict: expected tensors, got a {type(tensor).__name__} for '{name}': what "
                f"get_extra_state returns can only be saved with pickle, which no checkpoint uses"
            )
        if is_split(tensor):
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
    dtype: torch.dtype | None = None,
    subfolder: str = "",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> M:
    """Linearize a model as a saved one was, and give it the saved values.

    Everything is checked before anything is loaded: that the files are those that were written,
    that names and shapes are the model's, that every saved site has an owner in it. The first call
    of the model is then judged as `linearize` judges its example.

    Args:
        directory: what `t5fx.save_pretrained` wrote, adapter or whole; what the `save_pretrained`
            of a linearized model of transformers or diffusers wrote, or of a pipeline (then with
            the component's `subfolder`); or a repository of such files on the Hugging Face Hub,
            as "user/name".
        model: the original, of the class and configuration that were linearized. It gives the
            code and devices; from a whole checkpoint come all values, from an adapter the
            new ones only. Parameters may be on the meta device (a whole checkpoint then gives
            them): build it with `accelerate.init_empty_weights()`, which leaves buffers their
            values.
        config: instead of the saved one, to change what does not change the nodes (`grid`,
            `impl`); needed where the saved one had callables.
        inplace: change the model that is given, instead of a copy of it.
        device: where parameters go that were on the meta device.
        dtype: of the floating-point tensors that are loaded. Without it each has the dtype in
            which it was saved, whatever the model's was.
        subfolder: where in the directory or repository the checkpoint is.
        revision: of a repository on the Hub, as `huggingface_hub.snapshot_download` takes it.
        cache_dir: as there.
        token: as there.
        local_files_only: as there.

    Returns:
        What `linearize` returned before it was saved.

    Raises:
        CheckpointError: names the file, tensor, shape, version or site that is not as expected, or
            the repository that cannot be had.
        RefusedCallError, CaptureError: in the first call of the result, where the model has other
            attention than the one that was saved.
    """
    check_call(model, (), None)
    if unwrapped(model) is not model:
        raise CheckpointError(
            f"expected the model itself, got a {type(model).__name__} around it: load it first, "
            f"then wrap or compile the result"
        )
    refuse_linearized(model)
    folder = hub.local_folder(
        *(directory, subfolder),
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    checkpoint = Checkpoint(folder)
    chosen = config or checkpoint.config()
    nodes = fitting_nodes(checkpoint, model)
    check_originals(checkpoint, model)

    result = model if inplace else duplicate(model)
    device = torch.device(device)
    fill_meta(result, device)
    with torch.no_grad():
        originals = {plain_name(n): t for n, t in result.state_dict(keep_vars=True).items()}
        for name, value in checkpoint.tensors(lambda name: checkpoint.site(name) is None):
            _put(originals[name], value, dtype)
        new = dict(checkpoint.tensors(lambda name: checkpoint.site(name) is not None))
        for key, node in nodes.items():
            owner = module_at(result, key.rpartition(".")[0])
            first = next(owner.parameters(), None)
            node.to_empty(device=device if first is None else first.device)
            for name, tensor in node.state_dict(keep_vars=True).items():
                _put(tensor, new[f"{key}.{name}"], dtype)
    made: Any = with_nodes(result, chosen, nodes)
    return made  # type: ignore[no-any-return]


def _put(tensor: Tensor, value: Tensor, dtype: torch.dtype | None) -> None:
    """Give a tensor of a model its saved values and dtype, or another floating-point dtype."""
    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    if tensor.dtype != wanted:
        tensor.data = torch.empty_like(tensor, dtype=wanted)
    tensor.data.copy_(value)
