"""One name for each operator, whatever tracer wrote it down."""

from __future__ import annotations

import re
from functools import cache

import torch

#: Spellings of one operator -> the name used everywhere in t5fx.
ALIASES = {
    **dict.fromkeys(("bmm", "mm", "__matmul__", "linalg_matmul"), "matmul"),
    **dict.fromkeys(("_softmax", "special_softmax", "_safe_softmax"), "softmax"),
    **dict.fromkeys(("truediv", "true_divide", "divide", "__truediv__", "itruediv"), "div"),
    **dict.fromkeys(("multiply", "__mul__", "__rmul__", "imul"), "mul"),
    **dict.fromkeys(("__add__", "__radd__", "iadd"), "add"),
    **dict.fromkeys(("subtract", "__sub__", "isub"), "sub"),
    **dict.fromkeys(
        (
            *("view", "_unsafe_view", "view_as", "flatten", "unflatten", "unsqueeze", "squeeze"),
            *("reshape_as", "_reshape_alias", "squeeze_", "unsqueeze_"),
        ),
        "reshape",
    ),
    **dict.fromkeys(("swapaxes", "swapdims"), "transpose"),
    **dict.fromkeys(
        (
            *("_to_copy", "type_as", "float", "half", "bfloat16", "double", "type"),
            *("convert_element_type", "_autocast_to_reduced_precision"),
            "_autocast_to_full_precision",
        ),
        "to",
    ),
    **dict.fromkeys(
        (
            *("clone", "contiguous", "identity", "alias", "lift_fresh_copy"),
            *("lift_fresh", "positive", "pin_memory", "cuda", "cpu"),
        ),
        "identity",
    ),
    **dict.fromkeys(("native_dropout",), "dropout"),
    **dict.fromkeys(("native_layer_norm",), "layer_norm"),
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    **dict.fromkeys(("split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk"), "split"),
    **dict.fromkeys(("narrow",), "slice"),
    **dict.fromkeys(("size", "sym_size", "shape"), "sym_size"),
    **dict.fromkeys(("expand_as", "broadcast_to"), "expand"),
    **dict.fromkeys(("masked_fill_",), "masked_fill"),
    **dict.fromkeys(
        (
            "scaled_dot_product_flash_attention_for_cpu",
            "scaled_dot_product_flash_attention",
            "scaled_dot_product_efficient_attention",
            "scaled_dot_product_cudnn_attention",
            "scaled_dot_product_attention_math",
            "scaled_dot_product_fused_attention_overrideable",
        ),
        "scaled_dot_product_attention",
    ),
}


_SNAKE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@cache
def canonical(name: str) -> str:
    """Canonical name of an operator's base name."""
    if name in ALIASES:
        return ALIASES[name]
    bare = name.strip("_")
    return ALIASES.get(bare, bare or name)


@cache
def class_name(name: str) -> str:
    snake = _SNAKE.sub("_", name).lower()
    return snake if hasattr(torch.ops.aten, snake) else name.lower()


@cache
def is_pointwise(name: str) -> bool:
    if name in ("to", "identity", "detach", "dropout", "where", "masked_fill", "clamp"):
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())
