"""Random arguments for the TTT node, and a slow twin of it written from the equations."""

import itertools

import torch
from torch.nn.functional import silu

from t5fx.kernels import INNER_MODELS

#: The inner models that are trained on each input, and what stands in their place.
INNERS = sorted(name for name, mixer in INNER_MODELS.items() if mixer.has_loss)
LINEAR = ["hedgehog", "linear", "linear_projqk", "lit", "performer"]
LOSSES = ["dot", "l2"]
KEY_NORMS = ["instance", "instance_center", "instance_scale", "rms", "layer", "none"]

F_W = {
    "swiglu": lambda x, w1, w2, w3: (silu(x @ w1) * (x @ w2)) @ w3,
    "mlp2": lambda x, w1, w2: silu(x @ w1) @ w2,
    "mlp3": lambda x, w1, w2, w3: silu(silu(x @ w1) @ w2) @ w3,
    "gate1": lambda x, w1, w2: silu(x @ w1) * (x @ w2),
}

#: The weight of a key k for a query q, both [D], by linear attention; s is the scale.
SIMILARITY = {
    "linear": lambda s, q, k: _elu1(q) @ _elu1(k),
    "linear_projqk": lambda s, q, k, pq, pk: _elu1(q @ pq) @ _elu1(k @ pk),
    "lit": lambda s, q, k: q.clamp(min=0) @ k.clamp(min=0),
    "hedgehog": lambda s, q, k, wq, wk: _signs(s**0.5 * q @ wq) @ _signs(s**0.5 * k @ wk),
    "performer": lambda s, q, k, w: (_kernel(s**0.5 * q, w) * _kernel(s**0.5 * k, w)).mean(),
}


def _elu1(x):
    return torch.where(x > 0, x + 1, x.exp())


def _signs(x):
    e = x.exp(), (-x).exp()
    return torch.cat([y / y.sum() for y in e])


def _kernel(x, w):
    return (x @ w - x.square().sum() / 2).exp()


def arguments(
    *,
    batch=2,
    heads=2,
    head_dim=3,
    value_dim=4,
    grid=(2, 2),
    prefix=1,
    suffix=1,
    inner="swiglu",
    locality="dwc_qk",
    dtype=torch.float64,
    requires_grad=False,
    **settings,
):
    """Positional and keyword arguments of `ttt`: all random, weights large enough to matter."""
    tokens = prefix + torch.Size(grid).numel() + suffix

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

    q = random(batch, heads, tokens, head_dim)
    k = random(batch, heads, tokens, head_dim)
    v = random(batch, heads, tokens, value_dim)
    shapes = INNER_MODELS[inner].weight_shapes(head_dim, value_dim)
    weights = [random(heads, *shape) for shape in shapes]
    widths = {"dwc_qk": [head_dim, head_dim], "dwc_v": [value_dim], "none": []}[locality]
    conv = []
    for width in widths:
        conv += [random(heads * width, 1, *(3,) * len(grid)), random(heads * width)]
    keywords = {"scale": 0.7, "grid": grid, "prefix": prefix, "inner": inner, "locality": locality}
    return (q, k, v, weights, conv), keywords | settings


def tensors(args):
    """The tensors among the positional arguments, in order."""
    q, k, v, weights, conv = args
    return [q, k, v, *weights, *conv]


def naive(
    args,
    *,
    scale,
    grid,
    prefix=0,
    inner="swiglu",
    inner_loss="dot",
    key_norm="instance",
    key_norm_eps=1.0,
    locality="dwc_qk",
    key_mask=None,
):
    """The node head by head, the inner gradient by torch.func.grad, the convolution by loops."""
    q, k, v, weights, conv = args
    batch, heads, tokens, _ = q.shape
    every = torch.ones(batch, tokens, dtype=torch.bool) if key_mask is None else key_mask
    if key_mask is None:
        k = _normalised(k, key_norm, key_norm_eps)
    else:
        k = torch.stack(
            [_counted(x, m, key_norm, key_norm_eps) for x, m in zip(k, every, strict=True)]
        )
        places = torch.arange(tokens)
        off_grid = (places < prefix) | (places >= prefix + torch.Size(grid).numel())
        if locality == "dwc_qk":
            q = q * (every | off_grid)[:, None, :, None]
        v = v * every[:, None, :, None]
    if locality == "dwc_qk":
        q = q + _convolved(q, *conv[:2], grid, prefix)
        k = k + _convolved(k, *conv[2:], grid, prefix)
    elif locality == "dwc_v":
        v = v + _convolved(v, *conv, grid, prefix)
    if inner in SIMILARITY:
        return _linear(q, k, v, weights, scale, SIMILARITY[inner], every)
    f = F_W[inner]
    rows = []
    for b, h in itertools.product(range(batch), range(heads)):

        def loss(w, b=b, h=h):
            keys, values = k[b, h][every[b]], v[b, h][every[b]]
            rate = scale / max(1, len(keys))
            if inner_loss == "dot":
                return -rate * (values * f(keys, *w)).sum()
            return rate / 2 * (f(keys, *w) - values).square().sum()

        w = tuple(weight[h] for weight in weights)
        w = [old - step for old, step in zip(w, torch.func.grad(loss)(w), strict=True)]
        rows.append(f(q[b, h], *w))
    return torch.stack(rows).unflatten(0, (batch, heads))


def _counted(k, seen, key_norm, eps):
    """One item's keys, those that count normalised among themselves, others 0."""
    found = torch.zeros_like(k)
    found[:, seen] = _normalised(k[None, :, seen], key_norm, eps)[0]
    return found


def _linear(q, k, v, weights, scale, similarity, every):
    """Linear attention as softmax is: a weight for each pair of a query and a key."""
    out = torch.empty_like(v)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        w = [weight[h] for weight in weights]
        keys, values = k[b, h][every[b]], v[b, h][every[b]]
        row = torch.stack([similarity(scale, q[b, h, i], key, *w) for key in keys])
        out[b, h, i] = row @ values / row.sum()
    return out


def _normalised(k, key_norm, eps):
    axis = 3 if key_norm in ("rms", "layer") else 2
    mean = k.mean(axis, keepdim=True)
    std = ((k - mean).square().mean(axis, keepdim=True) + eps).sqrt()
    return {
        "instance": (k - mean) / std,
        "instance_center": k - mean,
        "instance_scale": k / std,
        "rms": k / (k.square().mean(axis, keepdim=True) + eps).sqrt(),
        "layer": (k - mean) / std,
        "none": k,
    }[key_norm]


def _convolved(x, weight, bias, grid, prefix):
    """What the depthwise convolution adds to each token, cell by cell."""
    _, heads, _, channels = x.shape
    weight = weight.reshape(heads, channels, -1)
    bias = bias.reshape(heads, channels)
    cells = list(itertools.product(*(range(size) for size in grid)))
    added = [torch.zeros_like(x[:, :, t]) for t in range(x.shape[2])]
    for cell in cells:
        total = bias.expand(x.shape[0], -1, -1)
        for tap, offset in enumerate(itertools.product((-1, 0, 1), repeat=len(grid))):
            neighbour = tuple(c + o for c, o in zip(cell, offset, strict=True))
            if neighbour in cells:
                total = total + weight[:, :, tap] * x[:, :, prefix + cells.index(neighbour)]
        added[prefix + cells.index(cell)] = total
    return torch.stack(added, dim=2)
