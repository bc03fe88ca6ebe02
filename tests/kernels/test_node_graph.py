"""The operator in graphs: torch.library's own checks, export, compile, torch.func, meta tensors."""

import nodes
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from t5fx.kernels import TTT, ttt

close = torch.testing.assert_close


class Site(nn.Module):
    """An attention block on an image whose size may vary."""

    def __init__(self, class_token=False):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.t5 = TTT(2, 4, 4, 2, scale=0.5)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8)) if class_token else None
        for weight in (self.t5.w1, self.t5.w2, self.t5.w3):
            nn.init.normal_(weight)  # large enough to matter

    def forward(self, image):
        x = image.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        prefix = 0 if self.class_token is None else 1
        return self.t5(q, k, v, image.shape[2:], prefix).transpose(1, 2).flatten(2)


def calls(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


# What torch's own checks warn of, about themselves.
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_opcheck():
    args, settings = nodes.arguments(requires_grad=True)
    settings["grid"] = list(settings["grid"])
    results = torch.library.opcheck(torch.ops.t5fx.ttt.default, (*args, [], []), settings)
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("class_token", [False, True])
def test_export_keeps_one_node_with_dynamic_sizes(class_token):
    auto = torch.export.Dim.AUTO
    site = Site(class_token)
    program = torch.export.export(
        site,
        (torch.randn(2, 8, 3, 5),),
        dynamic_shapes=({0: auto, 2: auto, 3: auto},),
        strict=False,
    )
    assert calls(program.graph).count("t5fx.ttt.default") == 1
    assert not any("mm" in call or "conv" in call for call in calls(program.graph))
    other = torch.randn(3, 8, 6, 2)
    close(program.module()(other), site(other))
    lowered = program.run_decompositions()
    assert "t5fx.ttt.default" not in calls(lowered.graph)
    close(lowered.module()(other), site(other))


def test_export_with_a_dynamic_number_of_tokens_on_one_axis():
    class Tokens(nn.Module):
        def forward(self, q, k, v, weights, conv):
            return ttt(q, k, v, weights, conv, scale=0.5, grid=(q.shape[2] - 2,), prefix=2)

    def make(tokens):
        return nodes.arguments(value_dim=3, grid=(tokens,), prefix=2, suffix=0)[0]

    axis = {2: torch.export.Dim.AUTO}
    program = torch.export.export(
        Tokens(),
        make(5),
        dynamic_shapes=(axis, axis, axis, [None] * 3, [None] * 4),
        strict=False,
    )
    assert calls(program.graph).count("t5fx.ttt.default") == 1
    args = make(9)
    close(program.module()(*args), Tokens()(*args))


# Both trace forward and backward with symbolic sizes; only Inductor then spends a minute on C++.
@pytest.mark.parametrize(
    "backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_forward_and_backward_equal_eager_at_two_resolutions(backend):
    site = Site()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(site, backend=counter, fullgraph=True)
    for size in ((3, 5), (6, 4)):
        image = torch.randn(2, 8, *size, requires_grad=True)
        torch._dynamo.mark_dynamic(image, [2, 3])
        inputs = [image, *site.parameters()]
        out, expected = compiled(image), site(image)
        close(out, expected, rtol=1e-4, atol=1e-4)
        cotangent = torch.randn_like(out)
        close(
            torch.autograd.grad(out, inputs, cotangent),
            torch.autograd.grad(expected, inputs, cotangent),
            rtol=1e-3,
            atol=1e-3,
        )
    assert counter.frame_count == 1
    assert calls(counter.graphs[0].graph).count("t5fx.ttt") == 1


def test_torch_func_sees_through_the_operator():
    (q, k, v, weights, conv), settings = nodes.arguments(batch=3)

    def loss(w1, q, k, v):
        rest = [w1, *weights[1:]]
        return ttt(q[None], k[None], v[None], rest, conv, **settings).square().sum()

    grad = torch.func.grad(loss)
    per_sample = torch.func.vmap(grad, in_dims=(None, 0, 0, 0))(weights[0], q, k, v)
    one_by_one = [grad(weights[0], *qkv) for qkv in zip(q, k, v, strict=True)]
    close(per_sample, torch.stack(one_by_one))
    # Without a transform between them, vmap meets the operator itself.
    losses = torch.func.vmap(loss, in_dims=(None, 0, 0, 0))(weights[0], q, k, v)
    close(losses, torch.stack([loss(weights[0], *qkv) for qkv in zip(q, k, v, strict=True)]))


def test_meta_tensors():
    args, settings = nodes.arguments()
    q, k, v, weights, conv = args
    meta = [x.to("meta") for x in (q, k, v)]
    out = ttt(*meta, [w.to("meta") for w in weights], [c.to("meta") for c in conv], **settings)
    real = ttt(*args, **settings)
    assert out.is_meta
    assert (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)
