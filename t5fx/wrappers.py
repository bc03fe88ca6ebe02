"""The wrappers that torch puts around modules, and the names of tensors without them."""

from __future__ import annotations

from torch import nn

#: The names under which wrappers keep the module that they are around: those of activation
#: checkpointing (torch.distributed's `checkpoint_wrapper`), torch.compile and FSDP.
_INSIDE = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's, DDP's and the other wrappers, or the model itself."""
    while True:
        inside = next((model._modules[name] for name in _INSIDE if name in model._modules), None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside = model.module
        if inside is None:
            return model
        model = inside


def plain_name(name: str) -> str:
    """The name of a module or tensor as it is without wrappers around modules of the model.

    >>> plain_name("blocks.0._checkpoint_wrapped_module.attn.qkv.weight")
    'blocks.0.attn.qkv.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _INSIDE)
