"""`linearize` and `explain`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import fx, nn

from t5fx.analysis.variant import check_variants
from t5fx.config import LinearizeConfig
from t5fx.errors import (
    AlreadyLinearizedError,
    CaptureError,
    ConfigError,
    T5Error,
)
from t5fx.frontend.copies import duplicate
from t5fx.frontend.unfit import check_has_code
from t5fx.hooks import Hook, hooks_of, run
from t5fx.pipeline import (
    build,
    build_graph,
    explained,
)
from t5fx.reports import Report
from t5fx.runtime.lookup import is_linearized, nodes_in, reports, runtimes
from t5fx.wrappers import uncompiled

M = TypeVar("M", bound=nn.Module)


@torch.inference_mode(False)
def linearize(
    model: M,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    config: LinearizeConfig | None = None,
    finetune: Hook | Sequence[Hook] | None = None,
    inplace: bool = False,
) -> M:
    """Rewrite every legal softmax attention of a model into a linear-time TTT node.

    The method is "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772). All
    pretrained weights are kept. Each site gets new parameters at `<owner>.t5`, which have to be
    trained before the outputs are those of the original again.

    Args:
        model: an nn.Module, or a torch.fx.GraphModule from any tracer.
        args: example inputs of one call. Of a GraphModule whose nodes carry shapes
            (`meta["val"]` or `meta["example_value"]`) none are needed.
        kwargs: the keyword arguments of that call.
        config: what to rewrite and how; see `LinearizeConfig`.
        finetune: what to train the result with: a hook or several, called in turn with the
            linearized module and the report. A hook changes the module in place, or returns
            another; `t5fx.Align` and `t5fx.FineTune` make such hooks.
        inplace: change the model that is given, instead of a copy of it.

    Returns:
        The model, with the same class, code, methods, children, hooks and state_dict keys. Only the
        modules that own a rewritten attention have another forward, and their new parameters at
        `<owner>.t5`. `t5fx.report(model)` says what was done, `t5fx.softmax(model)` brings the
        original attention back for a while. A call of a kind that was not judged yet (other
        arguments than tensors, other sizes where these are static) is judged before it runs.

    Raises:
        NothingRewrittenError: no site was rewritten; says why, and what would change it.
        AlreadyLinearizedError: the model has TTT nodes already.
        CaptureError: the model cannot be traced, or shapes are missing.
        HookError: a hook failed; its `.module` is the linearized model as the hook left it.
        T5Error: base of all of these.
    """
    config = _config(config)
    arguments, keywords = check_call(model, args, kwargs)
    hooks = hooks_of(finetune)
    refuse_linearized(model)
    result: Any
    if isinstance(model, fx.GraphModule):
        result = build_graph(
            model if inplace else duplicate(model), arguments, keywords, config, {}
        )
    else:
        result = build(model, arguments, keywords, config, {}, inplace=inplace)
    made: M = run(hooks, result, report(result))  # type: ignore[assignment]
    return made


def refuse_linearized(model: nn.Module) -> None:
    """Raise `AlreadyLinearizedError` for a model that has TTT nodes."""
    if nodes_in(model):
        raise AlreadyLinearizedError(
            f"expected a model with softmax attention, got {type(model).__name__} with TTT "
            f"nodes in it; take the original, with `include`/`exclude` to choose sites"
        )


def explain(
    model_or_gm: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    config: LinearizeConfig | None = None,
) -> Report:
    """Report what `linearize` would do, without doing it.

    The arguments are those of `linearize`; sizes are captured static. Of a model that is linearized
    already, it reports what was done, as `report` does. Raises `CaptureError` if the model cannot
    be captured. For any model that can be captured it raises no error.
    """
    config = _config(config)
    arguments, keywords = check_call(model_or_gm, args, kwargs)
    if is_linearized(model_or_gm):
        return report(model_or_gm)
    return explained(model_or_gm, arguments, keywords, config)


def report(model: nn.Module) -> Report:
    """Report what `linearize` did to a model.

    Args:
        model: what `linearize` returned, what torch.compile made of it, or a model that it is part
            of.

    Raises:
        T5Error: nothing in the model was linearized.
    """
    model = uncompiled(model)
    found = next(reports(model), None)
    if found is not None:
        return found
    raise T5Error(
        f"expected a linearized model, got a {type(model).__name__} with no TTT node: "
        f"t5fx.explain(model, args) says what could be rewritten"
    )


@contextmanager
def softmax(model: nn.Module) -> Iterator[None]:
    """Run a linearized model with its original softmax attention inside a `with` block.

    Raises `T5Error` if nothing in the model is linearized.
    """
    model = uncompiled(model)
    found = list(runtimes(model))
    if not found:
        raise T5Error(
            f"expected a linearized model, got a {type(model).__name__} with no rewritten module"
        )
    before = [runtime.original for runtime in found]
    try:
        for runtime in found:
            runtime.original = True
        yield
    finally:
        for runtime, original in zip(found, before, strict=True):
            runtime.original = original


def example_inputs(
    model: nn.Module, run: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) with which `run()` first calls a model; the call itself is not made.

    For models inside pipelines: `linearize(pipe.transformer, *example_inputs(pipe.transformer,
    lambda: pipe("a cat")))`. `run` is left at that call, by an exception that no `except Exception`
    catches.

    Raises `T5Error` where `run` does not call the model.
    """

    def take(_module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _CalledError(args, kwargs)

    handle = model.register_forward_pre_hook(take, with_kwargs=True, prepend=True)
    try:
        run()
    except _CalledError as called:
        return called.call
    finally:
        handle.remove()
    raise T5Error(
        f"run: expected a function that calls the {type(model).__name__} (as model(...), not as "
        f"model.forward(...)), got one that ended without such a call"
    )


class _CalledError(BaseException):
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = (args, kwargs)


def _config(config: Any) -> LinearizeConfig:
    if config is not None and not isinstance(config, LinearizeConfig):
        raise ConfigError(f"config: expected a LinearizeConfig, got {type(config).__name__}")
    config = config or LinearizeConfig()
    check_variants(config)
    return config


def check_call(model: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example call as a tuple and a dict; raises `CaptureError` where it is neither."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected an nn.Module or a GraphModule, got {type(model).__name__}")
    check_has_code(model)
    if isinstance(args, torch.Tensor):
        raise CaptureError(
            f"args: expected a tuple of the call's arguments, got a tensor of shape "
            f"{tuple(args.shape)}; write (x,) instead of x"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise CaptureError(
            f"kwargs: expected a mapping of names to arguments, got a {type(kwargs).__name__}; "
            f"positional arguments belong in args"
        )
    return tuple(args), dict(kwargs or {})
