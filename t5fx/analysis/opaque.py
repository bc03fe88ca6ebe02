"""Operators that nothing is known about, which may be attention: somebody's own kernels."""

from __future__ import annotations

import torch
from torch import fx

from t5fx.graph.modules import module_stack
from t5fx.graph.view import View

#: Namespaces whose operators are known, or do something else.
_KNOWN = ("aten", "prim", "prims", "t5fx", "higher_order", "inductor", "profiler", "torchvision")


def opaque_operators(view: View) -> list[str]:
    """Operators of other libraries that take queries, keys and values, each with its module.

    That is, three tensors or more of three axes or more, of which the first three have one size of
    a head; kernels written in Triton that the graph calls itself are among them.
    """
    found: dict[str, str] = {}
    for node in view.graph.nodes:
        name = _name(node)
        if name and _is_like_attention(view, node):
            stack = module_stack(node)
            found.setdefault(name, stack[-1][1] if stack else "")
    return [f"'{name}' in '{where}'" if where else f"'{name}'" for name, where in found.items()]


def _name(node: fx.Node) -> str:
    """The name of an operator of another library, or ""."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = target.default if hasattr(target, "default") else None
    if isinstance(target, torch._ops.OpOverload):
        return "" if target.namespace in _KNOWN else target._schema.name
    kernel = "triton_kernel_wrap" in str(target)
    return str(getattr(target, "__name__", target)) if kernel else ""


def _is_like_attention(view: View, node: fx.Node) -> bool:
    inputs = [n for n in node.all_input_nodes if view.val(n) is not None]
    shapes = [view.shape(n) for n in inputs if view.val(n).is_floating_point()]  # type: ignore
    shapes = [shape for shape in shapes if len(shape) > 2]
    return len(shapes) > 2 and len({str(shape[-1]) for shape in shapes[:3]}) == 1
