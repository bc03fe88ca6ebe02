"""`linearize` and `explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from t5fx.hooks import Hook, hooks_of, run
from t5fx.kernels import TTT
from t5fx.linearized import Linearized, refuse_calls, resolve, template_of
from t5fx.policy import plan
from t5fx.report import Report, why_nothing
from t5fx.rewrite import rewrite
from t5fx.writes import settle


@torch.inference_mode(False)
def linearize(
    model_or_gm: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    config: LinearizeConfig | None = None,
    finetune: Hook | Sequence[Hook] | None = None,
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
        finetune: what to train the result with: a hook or several, called in turn with the
            linearized module and the report. A hook changes the module in place, or returns
            another; `t5fx.Align` and `t5fx.FineTune` make such hooks.
        share_parameters: use the model's own parameters instead of copies of them, so that a
            large model needs no second copy; what trains them then trains the model's.

    Returns:
        For an nn.Module an nn.Module with the same call signature and return type, the original
        parameter names and its train/eval flags; for a GraphModule a GraphModule. `.report` says
        what was done. The given model is not changed; its forward and backward hooks are not
        taken over: register them on the returned one.

    Raises:
        NothingRewrittenError: no site was rewritten; says why, and what would change it.
        AlreadyLinearizedError: the model has TTT nodes already.
        CaptureError: the model cannot be traced, or shapes are missing.
        HookError: a hook failed; its `.module` is the linearized model as the hook left it.
        T5Error: base of all of these.
    """
    config = _config(config)
    arguments, keywords = check_call(model_or_gm, args, kwargs)
    hooks = hooks_of(finetune)
    refuse_linearized(model_or_gm)
    template = template_of(model_or_gm, share_parameters)
    result = build(template, arguments, keywords, config, {})
    if not result.report.rewritten:
        raise NothingRewrittenError(why_nothing(result.report))
    return run(hooks, result, result.report)


def refuse_linearized(model: nn.Module) -> None:
    """Raise `AlreadyLinearizedError` for a model that has TTT nodes."""
    if any(isinstance(m, Linearized | TTT) for m in model.modules()):
        raise AlreadyLinearizedError(
            f"expected a model with softmax attention, got {type(model).__name__} with TTT "
            f"nodes in it; take the original, with `include`/`exclude` to choose sites"
        )


def build(
    template: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: LinearizeConfig,
    nodes: Mapping[str, TTT],
) -> Linearized | fx.GraphModule:
    """The linearized form of a template (`template_of`), its report in `.report`.

    nodes: by key, those of the sites that are to be rewritten; where there are none, the
    configuration chooses the sites and fresh ones are made. Raises `RefusedCallError` where a
    site that has a node cannot be rewritten to it, `CaptureError` where it is not in the model.
    """
    if isinstance(template, fx.GraphModule):
        result: Linearized | fx.GraphModule = _build_graph(template, args, kwargs, config, nodes)
        used = {name for name, m in result.named_modules() if isinstance(m, TTT)}
    else:
        result = Linearized(template, config, nodes)
        bound = result._captures.signature.bind(args, kwargs)
        used = set(result.capture(*bound, result._mode()).nodes)
    if not used.issuperset(nodes):
        raise CaptureError(
            f"expected attention at {', '.join(map(repr, sorted(set(nodes) - used)))} in this call "
            f"of {type(template).__name__}, found none there"
        )
    _count(result.report, result)
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
    config = _config(config)
    arguments, keywords = check_call(model_or_gm, args, kwargs)
    report = Report(type(model_or_gm).__name__)
    if isinstance(model_or_gm, Linearized):
        return model_or_gm.report
    template = template_of(model_or_gm, share=True)
    if isinstance(template, fx.GraphModule):
        report.capture = _shapes(template, arguments, keywords)
        view = View(template.graph, template)
        settle(view)
        resolved = resolve(config, arguments, keywords)
    else:
        bound = Signature(template.forward).bind(arguments, keywords)
        captured = capture(template, *bound, seconds=0.0)
        report.capture = captured.note
        view = View(captured.graph, template, captured.constants)
        resolved = resolve(config, *bound)
    report.sites = [entry.site for entry in plan(view, resolved, tried=report.patterns)]
    _count(report, model_or_gm)
    return report


def _config(config: Any) -> LinearizeConfig:
    if config is not None and not isinstance(config, LinearizeConfig):
        raise ConfigError(f"config: expected a LinearizeConfig, got {type(config).__name__}")
    return config or LinearizeConfig()


def check_call(model: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example call as a tuple and a dict; raises `CaptureError` where it is neither."""
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
    return tuple(args), dict(kwargs or {})


def _build_graph(
    gm: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: LinearizeConfig,
    nodes: Mapping[str, TTT],
) -> fx.GraphModule:
    report = Report(type(gm).__name__)
    report.capture = _shapes(gm, args, kwargs)
    view = View(gm.graph, gm)
    settle(view)
    resolved = resolve(config, args, kwargs)
    plans = plan(
        view,
        resolved,
        lambda m: m.key in nodes if nodes else None,
        tried=report.patterns,
    )
    refuse_calls(view, plans, nodes)
    report.sites = [entry.site for entry in plans]
    for key, module in rewrite(view, plans, nodes).items():
        module.train(gm.training)
        gm.add_submodule(key, module)
    gm.recompile()
    gm.report, gm.linearize_config = report, config
    return gm


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
