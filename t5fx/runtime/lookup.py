"""What is linearized in a model, and how: found by looking, not kept in attributes of the model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from t5fx.config import LinearizeConfig
from t5fx.kernels import TTT
from t5fx.reports import Report
from t5fx.runtime.hooks import Before
from t5fx.runtime.owned import state_of
from t5fx.runtime.state import Runtime

#: Where a linearized GraphModule keeps its report and its options, in its `meta`.
REPORT, CONFIG = "t5fx_report", "t5fx_config"


def runtimes(model: nn.Module) -> Iterator[Runtime]:
    """Of the linearized models in a model, itself included."""
    seen: list[Runtime] = []
    for module in model.modules():
        state = state_of(module)
        if state is not None and not any(state.runtime is other for other in seen):
            seen.append(state.runtime)
            yield state.runtime


def config_of(module: nn.Module) -> LinearizeConfig | None:
    """The options that a module (not what is in it) was rewritten with, if it was."""
    state = state_of(module)
    if state is not None:
        return state.runtime.config
    meta = getattr(module, "meta", None) if isinstance(module, fx.GraphModule) else None
    found = meta.get(CONFIG) if isinstance(meta, dict) else None
    return found if isinstance(found, LinearizeConfig) else None


def configs(model: nn.Module) -> Iterator[LinearizeConfig]:
    """The options of all that is linearized in a model."""
    for module in model.modules():
        found = config_of(module)
        if found is not None:
            yield found


def reports(model: nn.Module) -> Iterator[Report]:
    """The reports of all that is linearized in a model."""
    for runtime in runtimes(model):
        yield runtime.report
    for module in model.modules():
        if isinstance(module, fx.GraphModule) and isinstance(module.meta.get(REPORT), Report):
            yield module.meta[REPORT]


def nodes_in(model: nn.Module) -> dict[str, TTT]:
    """The TTT nodes of a model by key."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TTT)}


def is_root(module: nn.Module) -> bool:
    """Whether a module is what `linearize` was given, and returned."""
    return any(isinstance(hook, Before) for hook in module._forward_pre_hooks.values())


def is_linearized(model: nn.Module) -> bool:
    """Whether attention in a model was rewritten in the model itself."""
    return next(configs(model), None) is not None
