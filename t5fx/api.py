"""`linearize` and `explain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from t5fx.calls import Signature
from t5fx.canon import View
from t5fx.capture import capture
from t5fx.config import LinearizeConfig
from t5fx.errors import AlreadyLinearizedError, CaptureError, ConfigError, NothingRewrittenError
from t5fx.kernels import TTT
from t5fx.linearized import Linearized, resolve, template_of
from t5fx.policy import plan
from t5fx.report import Report, why_nothing
from t5fx.rewrite import rewrite


@torch.inference_mode(False)
def linearize(
    model_or_gm: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    config: LinearizeConfig | None = None,
    share_parameters: bool = False,
) -> nn.Module:
    """Rewrite every legal softmax attention of a model into a linear-time TTT node.

    The method is "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772). All
    pretrained weights are kept; each site gets fresh ones at `<owner>.t5`, which fine-tuning has
    to train before the outputs mean what they meant.

    Args:
        model_or_gm: an nn.Module, or a torch.fx.GraphModule from any tracer.
        args, kwargs: example inputs of one call. Of a GraphModule whose nodes carry shapes
            (`meta["val"]` or `meta["example_value"]`) none are needed.
        config: what to rewrite and how; see `LinearizeConfig`.
        share_parameters: use the model's own parameters instead of copies of them.

    Returns:
        For an nn.Module an nn.Module with the same call signature and return type, the original
        parameter names and its train/eval flags; for a GraphModule a GraphModule. `.report` says
        what was done. The given model is not changed; its forward and backward hooks are not
        taken over: register them on the returned one.

    Raises:
        NothingRewrittenError: no site was rewritten; says why, and what would change it.
        AlreadyLinearizedError: the model has TTT nodes already.
        CaptureError: the model cannot be traced, or shapes are missing.
        T5Error: base of all of these.
    """
    config, arguments, keywords = _arguments(model_or_gm, args, kwargs, config)
    if any(isinstance(m, Linearized | TTT) for m in model_or_gm.modules()):
        raise AlreadyLinearizedError(
            f"expected a model with softmax attention, got {type(model_or_gm).__name__} with TTT "
            f"nodes in it; linearize the original, with `include`/`exclude` to choose sites"
        )
    template = template_of(model_or_gm, share_parameters)
    result: nn.Module
    if isinstance(template, fx.GraphModule):
        result, report = _linearize_graph(template, arguments, keywords, config)
    else:
        result = Linearized(template, config)
        bound = result._captures.signature.bind(arguments, keywords)
        result.capture(*bound, result._mode())
        report = result.report
    if not report.rewritten:
        raise NothingRewrittenError(why_nothing(report))
    _count(report, result)
    return result


def explain(
    model_or_gm: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    config: LinearizeConfig | None = None,
) -> Report:
    """What `linearize` would do, without doing it: the report alone.

    Arguments as for `linearize`; sizes are captured static. Raises `CaptureError` where the model
    cannot be captured, and nothing for a model that can be, whatever is in it.
    """
    config, arguments, keywords = _arguments(model_or_gm, args, kwargs, config)
    report = Report(type(model_or_gm).__name__)
    if isinstance(model_or_gm, Linearized):
        return model_or_gm.report
    template = template_of(model_or_gm, share=True)
    if isinstance(template, fx.GraphModule):
        report.capture = _shapes(template, arguments, keywords)
        view = View(template.graph, template)
        resolved = resolve(config, arguments, keywords)
    else:
        bound = Signature(template.forward).bind(arguments, keywords)
        captured = capture(template, *bound, seconds=0.0)
        report.capture = captured.note
        view = View(captured.graph, template, captured.constants)
        resolved = resolve(config, *bound)
    report.sites = [entry.site for entry in plan(view, resolved)]
    _count(report, model_or_gm)
    return report


def _arguments(
    model: Any, args: Any, kwargs: Any, config: Any
) -> tuple[LinearizeConfig, tuple[Any, ...], dict[str, Any]]:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected an nn.Module or a GraphModule, got {type(model).__name__}")
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
    if config is not None and not isinstance(config, LinearizeConfig):
        raise ConfigError(f"config: expected a LinearizeConfig, got {type(config).__name__}")
    return config or LinearizeConfig(), tuple(args), dict(kwargs or {})


def _linearize_graph(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], config: LinearizeConfig
) -> tuple[fx.GraphModule, Report]:
    report = Report(type(gm).__name__)
    report.capture = _shapes(gm, args, kwargs)
    view = View(gm.graph, gm)
    plans = plan(view, resolve(config, args, kwargs))
    report.sites = [entry.site for entry in plans]
    for key, module in rewrite(view, plans, {}).items():
        module.train(gm.training)
        gm.add_submodule(key, module)
    gm.recompile()
    gm.report = report
    return gm, report


def _shapes(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Make sure that every node carries its shape; says where the shapes come from."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    nodes = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    if nodes and all(View.meta(n) is not None for n in inputs) and View.meta(nodes[-1]) is not None:
        return "shapes from the graph's own metadata"
    if not args and not kwargs:
        raise CaptureError(
            "expected a GraphModule whose nodes carry shapes (meta['val'] or "
            "meta['example_value']), or example inputs to propagate; got neither: pass args"
        )
    names = [str(n.target).lstrip("*") for n in inputs]
    unknown = [k for k in kwargs if k not in names]
    values = [*args, *(kwargs[n] for n in names[len(args) :] if n in kwargs)]
    defaults = [n.args[0] for n in inputs[len(values) :] if n.args]
    values += defaults
    if unknown or len(values) != len(inputs):
        raise CaptureError(f"expected values for the inputs {names}, got {len(values)} of them")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        FakeTensorProp(gm, mode).propagate(*values)
    except Exception as error:
        raise CaptureError(f"the graph does not run on the example inputs: {error}") from error
    return "shapes propagated from the example inputs"


def _count(report: Report, model: nn.Module) -> None:
    parameters = list(model.parameters())
    report.total = sum(p.numel() for p in parameters)
    report.trainable = sum(p.numel() for p in parameters if p.requires_grad)
