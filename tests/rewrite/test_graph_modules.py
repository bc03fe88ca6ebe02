"""Graphs that come from any tracer: symbolic_trace, Dynamo, torch.export, make_fx."""

import pytest
import torch
from test_linearize import ALL, by_hand
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from vits import SPELLINGS, Shape

import t5fx
from t5fx.errors import CaptureError, NothingRewrittenError
from t5fx.kernels import TTT


def dynamo(model, images):
    """The torch-level graph that a Dynamo backend is given, with its inputs."""
    seen = []

    def backend(gm, inputs):
        seen.append((gm, inputs))
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(images)
    return seen[0]


def symbolic(model):
    """symbolic_trace of a model that reads sizes the way torch.fx allows."""
    return fx.symbolic_trace(model)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("tracer", ["dynamo", "export", "export_dynamic", "symbolic"])
def test_every_tracer(tracer, spelling):
    shape = Shape(spelling=spelling, batch=2)
    model, images = shape.model(), shape.images()
    args = ()
    if tracer == "dynamo":
        gm, inputs = dynamo(model, images)
    elif tracer == "symbolic":
        gm, args, inputs = symbolic(model), (images,), [images]
    else:
        auto = torch.export.Dim.AUTO
        dynamic = ({0: auto, 2: auto, 3: auto},) if tracer == "export_dynamic" else None
        program = torch.export.export(model, (images,), dynamic_shapes=dynamic, strict=False)
        gm, inputs = program.module(), [images]
    before = [n.name for n in gm.graph.nodes]
    lin = t5fx.linearize(gm, args, config=ALL)
    assert isinstance(lin, fx.GraphModule)
    assert [n.name for n in gm.graph.nodes] == before
    owners = [site.fqn for site in t5fx.report(lin).rewritten]
    assert owners == ["blocks.0.attn", "blocks.1.attn"]
    assert {n for n, m in lin.named_modules() if isinstance(m, TTT)} == {f"{o}.t5" for o in owners}
    out = lin(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(out, by_hand(model, lin, shape, images), rtol=1e-5, atol=1e-5)
    if tracer == "export_dynamic":
        other = torch.randn(3, 3, 20, 12)
        expected = by_hand(model, lin, shape, other)
        torch.testing.assert_close(lin(other), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_decomposed_aten_graphs(spelling):
    """make_fx gives core ATen: bmm over expanded views, _softmax, the CPU's flash attention."""
    shape = Shape(spelling=spelling, depth=1)
    model, images = shape.model(), shape.images()
    with torch.no_grad():
        gm = make_fx(model)(images)
        lin = t5fx.linearize(gm, (images,), config=ALL)
        twin = t5fx.linearize(model, (images,), config=ALL)
        (site,) = t5fx.report(lin).rewritten
        assert (site.num_heads, site.prefix, site.grid) == (2, 1, (3, 4))
        node = next(m for m in lin.modules() if isinstance(m, TTT))
        twin.blocks[0].attn.t5.load_state_dict(node.state_dict())
        assert node.scale == pytest.approx(twin.blocks[0].attn.t5.scale, rel=1e-6)
        torch.testing.assert_close(lin(images), twin(images), rtol=1e-5, atol=1e-5)


def test_a_dropout_module_between_softmax_and_values_goes_on_dropping():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.drop = torch.nn.Conv1d(3, 8, 1), torch.nn.Dropout(0.5)

        def forward(self, x):
            q = self.embed(x).transpose(1, 2).unsqueeze(1)
            return torch.matmul(self.drop((q @ q.transpose(-2, -1)).softmax(-1)), q)

    x = torch.randn(1, 3, 30)
    lin = t5fx.linearize(fx.symbolic_trace(Model()), (x,), config=ALL)
    assert not torch.equal(lin(x), lin(x))
    lin.eval()
    assert torch.equal(lin(x), lin(x))


def test_shapes_are_asked_for():
    gm = symbolic(Shape().model())
    with pytest.raises(CaptureError, match="pass args"):
        t5fx.linearize(gm)
    with pytest.raises(CaptureError, match="inputs"):
        t5fx.linearize(gm, kwargs={"wrong": torch.zeros(1)})
    with pytest.raises(CaptureError, match="does not run"):
        t5fx.explain(gm, (torch.zeros(2, 5),))


def test_explain_leaves_the_graph_alone():
    gm = symbolic(Shape().model())
    code = gm.code
    metas = [dict(n.meta) for n in gm.graph.nodes]
    report = t5fx.explain(gm, (Shape().images(),), config=ALL)
    assert len(report.rewritten) == 2
    assert gm.code == code
    assert [n.meta.keys() for n in gm.graph.nodes] == [m.keys() for m in metas]
    with pytest.raises(NothingRewrittenError):
        t5fx.linearize(gm, (Shape().images(),))
