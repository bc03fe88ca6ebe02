"""Rules for operators that compute: products, convolutions, norms, reductions."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from t5fx.analysis.axis import Axis, Batch, Feature, Merge, Piece, Side, Spatial, Unit
from t5fx.analysis.meaning import Axes, pointwise, rank_of, rule
from t5fx.analysis.tokens import merge
from t5fx.graph.sizes import expr, hint, same
from t5fx.graph.view import View
from t5fx.patterns import patterns


@rule("mean", "sum", "amax", "amin")
def reduced(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """What is left when some axes are summed up."""
    source = list(axes[axes.view.inputs(node)[0]])
    dims = axes.view.arg(node, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return None
    dims = {d % len(source) for d in dims}
    value = View.meta(node)
    value = value[0] if isinstance(value, tuple) else value
    if value.dim() == len(source):
        return tuple(Unit() if i in dims else a for i, a in enumerate(source))
    return tuple(a for i, a in enumerate(source) if i not in dims)


@rule("view_as_complex")
def _complex(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    return axes[axes.view.inputs(node)[0]][:-1]


@rule("view_as_real")
def _real(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    source = axes[axes.view.inputs(node)[0]]
    return (*source, axes.fresh(node, len(source), Feature))


@rule("linear")
def _linear(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    source = axes[axes.view.inputs(node)[0]]
    return (*source[:-1], axes.fresh(node, len(source) - 1, Feature))


@rule("outer", "ger")
def _outer(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    left, right = (axes[n] for n in axes.view.inputs(node))
    return (*left, *right)


@rule("matmul", "baddbmm", "addmm")
def _matmul(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    operands = [axes[n] for n in axes.view.inputs(node)[-2:]]
    rank = rank_of(axes, node)
    if len(operands) != 2 or min(map(len, operands)) < 2 or rank < 2:
        return None
    left, right = operands
    batch = pointwise(axes, node)[: rank - 2]
    if len(left) == len(right) == rank:
        pairs = zip(left[:-2], right[:-2], strict=True)
        batch = tuple(b if isinstance(a, Unit) else a for a, b in pairs)
    elif len(left) == rank:
        batch = left[:-2]
    weights = not axes.data(axes.view.inputs(node)[-1])
    return (*batch, left[-2], axes.fresh(node, rank - 1, Feature) if weights else right[-1])


@rule(*(pattern.anchor for pattern in patterns() if pattern.whole))
def attention(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    query, value = (axes[axes.view.arg(node, name)] for name in ("query", "value"))
    return (*query[:-1], value[-1])


@rule("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "softmax")
def normalised(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    return axes[axes.view.inputs(node)[0]]


@rule("log_softmax", "cumsum", "normalize", "native_group_norm", "linalg_vector_norm")
def _along(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    source = axes[axes.view.inputs(node)[0]]
    return source if len(source) == rank_of(axes, node) else None


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    """Spatial axes whose size a convolution keeps stay what they were; others begin anew."""
    source = axes[axes.view.inputs(node)[0]]
    shape = axes.view.shape(node)
    kept = [
        source[i]
        if len(source) == len(shape) and same(source[i].size, size) and source[i].spatial
        else axes.fresh(node, i, Spatial)
        for i, size in enumerate(shape)
    ]
    batch = source[0] if len(source) == len(shape) else axes.fresh(node, 0, Batch)
    if len(shape) > 3:
        batch = _frames(batch)
    return (batch, axes.fresh(node, 1, Feature), *kept[2:])


def _frames(batch: Axis) -> Axis:
    """Of the images that a convolution takes one by one: frames, where an input is a video.

    That is, one side of an input merged with its batch; it is an axis of the video's grid.
    """
    if isinstance(batch, Side):  # the batch itself has one item
        return _frame(batch)
    if not isinstance(batch, Merge) or sum(isinstance(p, Side) for p in batch.parts) != 1:
        return batch
    parts = (_frame(part) if isinstance(part, Side) else part for part in batch.parts)
    return replace(batch, parts=tuple(parts))


def _frame(side: Side) -> Spatial:
    return Spatial(side.size, side.made, data=side.data, at=side.at, example=side.example)


@rule(
    *("avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "pixel_shuffle", "pixel_unshuffle"),
    *("upsample_bicubic2d_aa", "upsample_bicubic2d", "upsample_bilinear2d_aa", "interpolate"),
    *("upsample_bilinear2d", "upsample_nearest2d", "avg_pool3d", "max_pool2d_with_indices"),
    *("avg_pool1d", "max_pool1d"),
)
def _resampled(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    batch, made = axes[axes.view.inputs(node)[0]][0], axes.fresh(node, 0, Batch)
    windows = any(isinstance(part, Piece) for part in (batch, *batch.inside))
    kept = same(batch.size, made.size) and not windows
    spatial = (axes.fresh(node, i, Spatial) for i in range(2, rank_of(axes, node)))
    return (batch if kept else made, axes.fresh(node, 1, Feature), *spatial)


@rule("im2col", "unfold")
def _unfolded(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """F.unfold: [B, C, H, W] to [B, C * kernel, rows * columns of blocks].

    Tensor.unfold, whose result has more axes than its input, is none.
    """
    source = axes.view.inputs(node)[0]
    if rank_of(axes, node) != 3 or len(axes[source]) != 4:
        return None
    value, sides = axes.view.val(source), []
    options = {"kernel_size": None, "dilation": 1, "padding": 0, "stride": 1}
    given = [axes.view.arg(node, key, default) for key, default in options.items()]
    for i, name in enumerate(("rows", "columns")):
        kernel, dilation, padding, stride = (n if isinstance(n, int) else n[i] for n in given)
        assert value is not None
        count = (value.shape[i + 2] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        sides.append(Spatial(expr(count), (node.name, name), example=hint(count)))
    blocks = merge(sides, axes.view.shape(node)[2])
    return (axes[source][0], axes.fresh(node, 1, Feature), blocks)


def _is_floating(view: View, node: fx.Node) -> bool:
    value = view.val(node)
    return value is not None and value.is_floating_point()


@rule("embedding")
def _embedding(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    # torch.nn.functional's takes the indices first, ATen's the table.
    numbers = (n for n in axes.view.inputs(node)[:2] if not _is_floating(axes.view, n))
    indices = axes[next(numbers)]
    return (*indices, axes.fresh(node, len(indices), Feature))
