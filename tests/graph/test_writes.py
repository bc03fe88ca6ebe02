"""Graphs that write into tensors mean the same after the writes were made values of their own."""

from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import fx, nn

import t5fx
from t5fx.graph.view import View, changed
from t5fx.graph.writes import settle

CONFIG = t5fx.LinearizeConfig(min_tokens=0)


class Program(nn.Module):
    """Runs a function of two tensors."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


def exported(function, x, y) -> fx.GraphModule:
    return torch.export.export(Program(function), (x, y), strict=False).module(check_guards=False)


def by_dynamo(function, x, y) -> fx.GraphModule:
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True, dynamic=False)(x.clone(), y.clone())
    return graphs[0]


def settled(graph: fx.GraphModule) -> fx.GraphModule:
    settle(View(graph.graph, graph))
    graph.graph.lint()
    graph.recompile()
    return graph


def called(graph, x, y):
    """The graph's result; Dynamo's inputs are in the order of their first use."""
    names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    return graph(*(y if "y" in name else x for name in names))


def writes(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if changed(node)]


def check(trace, function, left=None):
    """The settled graph gives the same; `left` writes are still in it."""
    x, y = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    expected = function(x.clone(), y.clone())
    graph = settled(trace(function, x.clone(), y.clone()))
    got = called(graph, x.clone(), y.clone())
    got = got[0] if isinstance(got, tuple) and not isinstance(expected, tuple) else got
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    if left is not None:
        assert len(writes(graph)) == left, graph.graph


def slice_written(x, y):
    x = x * 2
    x[:, 2:] = y[:, 2:] * 3
    return x.sum(-1)


def two_axes(x, y):
    x = x * 2
    x[..., 1:4, 2:5] = y[..., 1:4, 2:5]
    return x.cos()


def added_to(x, y):
    x = x * 2
    x[:, 2:, ::2] += y[:, 2:, ::2]
    return x.cos()


def all_of_it(x, y):
    x = x * 2
    x[:, 0:] = y + x
    return x.cos()


def half_swapped(x, y):
    x = x + y
    x[:, :3] = x[:, 3:]
    return x.cos()


def filled(x, y):
    out = x.new_zeros(4, 12, 8)
    out[:, :6], out[:, 6:] = x, y
    return out.cos()


def of_a_view(x, y):
    x = (x * 2).transpose(1, 2)
    x[:, 1:3] = y.transpose(1, 2)[:, 1:3]
    return x.cos()


def one_position(x, y):
    x = x * 2
    x[:, 3] = y[:, 3]
    return x.cos()


def items(x, y):
    x = x * 2
    x[1, 2:] = y[0, 2:]
    x[2, 1:, -3], x[-1] = y[1, 1:, 0], y[2]
    return x.cos()


def twice(x, y):
    x = x * 2
    x[:, 3:].mul_(2).add_(y[:, 3:])
    part = x[1]
    part.add_(y[0])
    part.mul_(2)
    return x.cos()


def copied_then_changed(x, y):
    x, y = x * 2, y * 3
    x[1].copy_(y[0]).add_(1)
    return x + y


@pytest.mark.parametrize("trace", [exported, by_dynamo])
@pytest.mark.parametrize(
    "function",
    [slice_written, two_axes, added_to, all_of_it, half_swapped, filled, of_a_view]
    + [one_position, items, twice, copied_then_changed],
)
def test_made_a_value(trace, function):
    check(trace, function, left=0)


def view_read_later(x, y):
    x = x * 2
    view = x.transpose(1, 2)
    x[:, 2:] = y[:, 2:]
    return view.cos()


def base_read_later(x, y):
    x = x * 2
    view = x.flatten(1)
    view[:, 4:] = y.flatten(1)[:, 4:]
    return x.cos()


def input_written(x, y):
    x[:, 2:] = y[:, 2:]
    return x.cos()


def value_changed_later(x, y):
    x, y = x * 2, y * 3
    x[:, 0:] = y
    y.mul_(5)
    return x + y


def part_read_later(x, y):
    x = x * 2
    part = x[1]
    part.add_(y[0])
    x[1, 2:] = y[2, 2:]
    return x.cos() + part


@pytest.mark.parametrize("trace", [exported, by_dynamo])
@pytest.mark.parametrize(
    "function",
    [view_read_later, base_read_later, input_written, value_changed_later, part_read_later],
)
def test_left_where_another_view_could_see_it(trace, function):
    check(trace, function)


def test_history_is_kept_where_gradients_are_off():
    def function(x, y):
        x = x * 2
        with torch.no_grad():
            x[:, 2:] = y[:, 2:]
        return x.cos()

    x = torch.randn(4, 6, 8, requires_grad=True)
    y = torch.randn(4, 6, 8)
    (expected,) = torch.autograd.grad(function(x, y).sum(), x)
    graph = settled(by_dynamo(function, x.detach(), y))
    out = called(graph, x, y)
    (got,) = torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), x)
    torch.testing.assert_close(got, expected)


_SLICES = st.builds(slice, st.integers(0, 2), st.integers(3, 5), st.sampled_from([None, 2]))
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "add", "scale", "twice", "view", "read", "call"]),
        st.tuples(_SLICES, _SLICES),
    ),
    min_size=1,
    max_size=6,
)


def run(steps, x, y):
    """A program of writes to parts, views made, and reads."""
    x = x * 2
    views, total = [], torch.zeros(())
    for kind, key in steps:
        if kind == "write":
            x[(slice(None), *key)] = y[(slice(None), *key)]
        elif kind == "add":
            x[(slice(None), *key)] += 1
        elif kind == "scale":
            x[(slice(None), *key)].mul_(0.5)
        elif kind == "twice":
            part = x[(slice(None), *key)]
            part.mul_(0.5)
            views.append(part.add_(1))
        elif kind == "view":
            views.append(x[(slice(None), *key)])
        elif kind == "read":
            total = total + sum((v.sin().sum() for v in views), x.cos().sum())
        else:
            x = x + 1
    return total + x.cos().sum()


@settings(deadline=None)
@given(_STEPS)
def test_drawn_programs(steps):
    check(exported, lambda x, y: run(steps, x, y))


class Joint(nn.Module):
    """Joint attention whose rotary embedding is written into the image's part of q and k."""

    def __init__(self, how="slice", order=None):
        super().__init__()
        self.how, self.order = how, order
        self.embed, self.text = nn.Conv2d(3, 16, 4, 4), nn.Linear(8, 16)
        self.qkv = nn.Linear(16, 48)

    def rotated(self, x):
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.arange(1.0, 5.0)
        first, second = x.chunk(2, -1)
        if self.order is not None:
            first, second = first[:, :, self.order], second[:, :, self.order]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def turned(self, x, start):
        if self.how == "slice":
            x[:, :, start:] = self.rotated(x[:, :, start:])
            return x
        return torch.cat([x[:, :, :start], self.rotated(x[:, :, start:])], 2)

    def forward(self, images, words):
        text = self.text(words)
        x = torch.cat([text, self.embed(images).flatten(2).mT], 1)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q, k = (self.turned(F.layer_norm(t, (8,)), text.shape[1]) for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_rotary_embedding_written_into_a_slice():
    args = torch.randn(2, 3, 12, 16), torch.randn(2, 5, 8)
    model = Joint()
    plain = Joint("cat")
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(*args), plain(*args))
    fast, reference = (t5fx.linearize(m, args, config=CONFIG) for m in (model, plain))
    reference.load_state_dict(fast.state_dict())
    (site,) = t5fx.report(fast).sites
    assert (site.status, site.prefix, site.grid, site.suffix) == ("rewritten", 5, (3, 4), 0)
    other = torch.randn(1, 3, 20, 8), torch.randn(1, 3, 8)
    for call in (args, other):
        torch.testing.assert_close(fast(*call), reference(*call))


def test_other_tokens_written_into_a_slice_are_no_grid():
    args = torch.randn(2, 3, 12, 16), torch.randn(2, 5, 8)
    order = torch.randperm(12)
    (site,) = t5fx.explain(Joint(order=order), args, config=CONFIG).sites
    assert site.status == "skipped", site
    assert site.reason in ("grid-unknown", "cross-attention")


class Biased(nn.Module):
    """Attention whose scores get something added in place, to a part of them."""

    parts: ClassVar = {
        "whole": lambda scores, bias: scores[:, :, 0:, 0:].add_(bias),
        "part": lambda scores, bias: scores[:, :, 1:, 1:].add_(bias[1:, 1:]),
        "written": lambda scores, bias: scores[:, :, 1:, 1:].copy_(
            scores[:, :, 1:, 1:] + bias[1:, 1:]
        ),
    }

    def __init__(self, part):
        super().__init__()
        self.part = self.parts[part]
        self.embed, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48)
        self.bias = nn.Parameter(torch.randn(12, 12))

    def forward(self, images):
        x = self.embed(images).flatten(2).mT
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = q * 8**-0.5 @ k.mT
        self.part(scores, self.bias)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("part", list(Biased.parts))
def test_bias_added_in_place_to_a_part(part):
    (site,) = t5fx.explain(Biased(part), (torch.randn(2, 3, 12, 16),), config=CONFIG).sites
    assert (site.status, site.reason) == ("skipped", "additive-bias"), site
