"""Shapes for the nodes of a given graph."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from t5fx.errors import CaptureError
from t5fx.graph.view import View


def add_shapes(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
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
