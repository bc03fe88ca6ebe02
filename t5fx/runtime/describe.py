"""What is kept of a linearized model beside its tensors, to make its nodes again."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import nn

from t5fx.checkpoint.description import CALLABLE, ENTRY, Description
from t5fx.config import LinearizeConfig
from t5fx.kernels import TTT
from t5fx.kernels.module import SETTINGS
from t5fx.reports import Site
from t5fx.runtime.lookup import nodes_in
from t5fx.wrappers import plain_name

#: The arguments of a node that are kept with it; its name, dtype and device are the model's.
_SETTINGS = ("num_heads", "head_dim", "value_dim", "grid_ndim", *SETTINGS, "seed")


def describe(
    model: nn.Module, nodes: Mapping[str, TTT], config: LinearizeConfig, content: str = "model"
) -> Description:
    """The description of a model with these nodes, by key."""
    return Description(
        content=content,
        model=type(model).__name__,
        config=config.to_dict(callables=CALLABLE),
        sites={
            plain_name(key): {name: getattr(node, name) for name in _SETTINGS}
            for key, node in nodes.items()
        },
        made_with={"t5fx": metadata.version("t5fx"), "torch": torch.__version__},
    )


def tell_library(model: nn.Module, config: LinearizeConfig) -> None:
    """Put the description into the configuration that a model's library saves with it.

    So `save_pretrained` of a linearized model of transformers or diffusers, which saves the nodes'
    tensors anyway, and a pipeline's, write what `t5fx.from_pretrained` needs to know. Other models
    have no such configuration.
    """
    own: dict[str, Any] = vars(model)
    if "_internal_dict" in own and hasattr(model, "register_to_config"):  # diffusers
        model.register_to_config(**{ENTRY: describe(model, nodes_in(model), config).to_dict()})  # type: ignore[operator]
    elif isinstance(own.get("config"), getattr(type(model), "config_class", None) or ()):
        # transformers
        setattr(own["config"], ENTRY, describe(model, nodes_in(model), config).to_dict())


def sites_of(nodes: Mapping[str, TTT]) -> list[Site]:
    """What is known of rewritten sites before a call is judged."""
    return [
        Site(
            fqn=key.rpartition(".")[0],
            status="rewritten",
            num_heads=node.num_heads,
            head_dim=node.head_dim,
        )
        for key, node in nodes.items()
    ]
