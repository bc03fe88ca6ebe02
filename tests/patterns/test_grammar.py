"""Properties of drawn spellings of attention, of drawn near misses, and of changed graphs."""

import random

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from spellings import MISSES, Attention, Fused, near_misses, spellings
from torch import fx
from torch._functorch.compile_utils import fx_graph_cse

import t5fx
from t5fx.kernels import TTT
from t5fx.training.students import Student, taught

STATIC = t5fx.LinearizeConfig(min_tokens=0, dynamic=False)
# 50 spellings in CI and 750 at night; near misses likewise.
MANY = examples(50)


def images(dtype=torch.float64):
    return torch.randn(2, 3, 12, 16, dtype=dtype)


def made(kind, spelling):
    return kind(spelling).double().eval()


def graph_of(model, decomposed=False) -> fx.GraphModule:
    """The model as a graph, of torch's operators or of the core ones they decompose to."""
    program = torch.export.export(model, (images(),), strict=False)
    program = program.run_decompositions() if decomposed else program
    return program.module(check_guards=False)


@MANY
@given(spellings)
def test_every_spelling_is_found_and_is_the_fused_one(spelling):
    """The site's q, k, v and scale give the original's output, and the node the fused call's."""
    x = images()
    model, fused = made(Attention, spelling), made(Fused, spelling)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if spelling.exact else {"rtol": 1e-4, "atol": 1e-5}
    expected = model(x)
    torch.testing.assert_close(expected, fused(x), **tolerance)
    lin, wanted = (t5fx.linearize(m, (x,), config=STATIC) for m in (model, fused))
    (site,) = t5fx.report(lin).sites
    assert (site.status, site.prefix, site.grid, site.suffix) == ("rewritten", 0, (3, 4), 0)
    ((key, node),) = [(n, m) for n, m in lin.named_modules() if isinstance(m, TTT)]
    assert node.scale == pytest.approx(model.own_scale(), rel=1e-6)
    with taught({key: Student(key, node)}, lin):  # softmax(scale q k^T) v in the node's place
        torch.testing.assert_close(lin(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lin(x), wanted(x), **tolerance)


@MANY
@given(near_misses)
def test_no_near_miss_is_rewritten(spelling):
    report = t5fx.explain(made(Attention, spelling), (images(),), config=STATIC)
    assert report.rewritten == []
    reasons = {site.reason for site in report.sites}
    assert reasons and reasons <= MISSES[spelling.miss][0] | {"not-attention"}, report.sites
    assert reasons & MISSES[spelling.miss][0], report.sites


def sites(graph: fx.GraphModule):
    report = t5fx.explain(graph, config=STATIC)
    return sorted(
        (s.status, str(s.reason), s.num_tokens, str(s.grid), s.num_heads) for s in report.sites
    )


def retraced(graph, seed):
    return torch.export.export(graph, (images(),), strict=False).module(check_guards=False)


def with_dead_code(graph, seed):
    """A copy of everything from a product on, read by nothing."""
    copies = {}
    last = list(graph.graph.nodes)[-1]
    with graph.graph.inserting_before(last):
        for node in list(graph.graph.nodes):
            if node.op in ("call_function", "call_method") and node.users:
                copies[node] = graph.graph.node_copy(node, lambda n: copies.get(n, n))
    return graph


def reordered(graph, seed):
    """Another order that respects what reads what; constants and inputs stay first."""
    shuffle = random.Random(seed)
    nodes = [n for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
    done = {n for n in graph.graph.nodes if n.op == "placeholder"}
    output = next(n for n in graph.graph.nodes if n.op == "output")
    while nodes:
        ready = [n for n in nodes if done.issuperset(n.all_input_nodes)]
        chosen = shuffle.choice(ready)
        output.prepend(chosen)
        nodes.remove(chosen)
        done.add(chosen)
    return graph


def without_common_parts(graph, seed):
    return fx.GraphModule(graph, fx_graph_cse(graph.graph))


def with_no_ops(graph, seed):
    """Operators that do nothing behind some of the others."""
    shuffle = random.Random(seed)
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or node.op == "get_attr" or shuffle.random() > 0.3:
            continue
        target, more = shuffle.choice(
            [
                *(
                    (aten.clone.default, ()),
                    (aten.contiguous.default, ()),
                    (aten.alias.default, ()),
                ),
                *((aten.to.dtype, (value.dtype,)), (aten.view.default, (list(value.shape),))),
            ]
        )
        if target is aten.view.default and not value.is_contiguous():
            continue
        with graph.graph.inserting_after(node):
            new = graph.graph.call_function(target, (node, *more))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    return graph


@examples(10)
@given(
    st.one_of(spellings, near_misses),
    st.booleans(),
    st.sampled_from([retraced, with_dead_code, reordered, without_common_parts, with_no_ops]),
    st.integers(0, 1000),
)
def test_sites_are_the_same_in_changed_graphs(spelling, decomposed, change, seed):
    if spelling.place == "in place" or "in place" in spelling.miss:
        decomposed = True  # only what is computed out of place may be moved
    model = made(Attention, spelling)
    graph = graph_of(model, decomposed)
    before = sites(graph_of(model, decomposed))
    changed = change(graph, seed)
    changed.graph.lint()
    assert sites(changed) == before


@examples(10)
@given(spellings)
def test_graphs_of_core_operators(spelling):
    """What is left of a spelling after decomposition is the same attention."""
    x = images()
    graph = graph_of(made(Attention, spelling), decomposed=True)
    lin = t5fx.linearize(graph, config=STATIC)
    (site,) = t5fx.report(lin).sites
    assert (site.status, site.grid) == ("rewritten", (3, 4)), site
    wanted = t5fx.linearize(made(Fused, spelling), (x,), config=STATIC)
    torch.testing.assert_close(lin(x), wanted(x), rtol=1e-4, atol=1e-5)
