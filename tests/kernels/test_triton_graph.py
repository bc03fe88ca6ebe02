"""impl="triton" as compilers see it, without a GPU: launches in a graph, for all resolutions."""

import collections

import pytest
import torch
import triton
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from triton.backends.compiler import GPUTarget
from vits import Shape

import t5fx
from t5fx.kernels import TTT, NodeArgumentError, ttt
from t5fx.kernels.triton_kernels import launch


class OfAnH100:
    """A driver for the part of Triton that reads a kernel's source; it runs nothing."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.t5 = TTT(2, 64, 64, scale=0.125, grid_ndim=2, impl="triton")

    def forward(self, qkv, image):
        """qkv [B, 1 + H*W, 3*128], image [H, W]."""
        q, k, v = qkv.unflatten(2, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        out = self.t5(q, k, v, grid=image.shape, prefix=1)
        return out.transpose(1, 2).flatten(2)


@pytest.fixture
def pretended(monkeypatch):
    """CPU tensors are taken for a GPU's, and nothing is launched."""
    monkeypatch.setattr(launch, "check_device", lambda device: None)
    monkeypatch.setattr(triton.runtime.driver, "_active", OfAnH100())


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_one_graph_of_launches_for_all_resolutions(pretended, caplog):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        results = graph.graph.output_node().args[0]
        return lambda *_: [zeros(n.meta["val"]) if n is not None else None for n in results]

    def zeros(value):
        """Of the first call's sizes."""
        if not isinstance(value, torch.Tensor):
            return 1
        shape = (s.node.hint if isinstance(s, torch.SymInt) else s for s in value.shape)
        return torch.zeros(*shape, dtype=value.dtype)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    model = torch.compile(Attention(), backend=backend, fullgraph=True, dynamic=True)
    for height, width in ((14, 15), (20, 21)):
        qkv = torch.randn(2, 1 + height * width, 384, requires_grad=True)
        out = model(qkv, torch.empty(height, width))
        if len(graphs) == 1:
            out.sum().backward()
    assert len(graphs) == 2  # of both resolutions
    forward, backward = (
        collections.Counter(str(n.target) for n in graph.graph.nodes) for graph in graphs
    )
    assert forward["triton_kernel_wrapper_functional"] == 5
    assert backward["triton_kernel_wrapper_functional"] == 7
    assert backward["aten.sum.dim_IntList"] == 3  # of q's taps one, of k's by batch item, then all
    assert not [name for name in (*forward, *backward) if "t5fx" in name]
    # Inductor takes a quotient of sizes for an integer.
    for graph in graphs:
        for node in graph.graph.nodes:
            if "triton_kernel_wrapper" in str(node.target):
                values = [getattr(a, "meta", {}).get("val") for a in node.kwargs["kwargs"].values()]
                assert not [v for v in values if isinstance(v, torch.SymFloat)]
    # torch copies what it takes to be written to.
    assert "assuming every input is mutated" not in caplog.text
    written = {}
    for graph in graphs:
        for node in graph.graph.nodes:
            if "triton_kernel_wrapper" in str(node.target):
                name = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
                written.setdefault(name, set()).update(node.kwargs["tensors_to_clone"])
    assert written == {
        "prepare": {"partial", "quads", "taps"},
        "key_norm": {"mean", "rstd"},
        "inner_gradient": {"partial", "dx", "kept"},
        "sum_matrices": {"out1", "out2", "out3"},
        "query_output": {"out"},
        "second_order_gradient": {"partial", "dx", "dg"},
        "convolution_gradient": {"partial", "dx"},
        "key_norm_gradient": {"dx"},
    }


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_widths_may_be_symbols(pretended):
    """Where parameters are arguments of what is compiled, dynamic=True makes all sizes symbols."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return lambda *_: [torch.zeros(1, 2, 12, 32).transpose(1, 2)]

    def call(q, weights, grid):
        return ttt(q, q, q, weights, scale=0.1, grid=grid, locality="none", impl="triton")

    compiled = torch.compile(call, backend=aot_autograd(fw_compiler=keep), dynamic=True)
    for tokens in (12, 15):
        with torch.no_grad():
            compiled(torch.randn(1, 2, tokens, 32), [torch.randn(2, 32, 32)] * 3, (tokens,))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("dim", "begin", "unit"),
    [(72, 0, 8), (20, 0, 2), (17, 0, 1), (64, 8, 8), (64, 1, 1), (64, 2, 1)],
)
def test_what_may_be_loaded_at_once(dim, begin, unit):
    """8 elements only from multiples of 16 bytes, in the memory too."""
    memory = torch.empty(begin + 3 * 5 * 3 * dim, dtype=torch.bfloat16)
    packed = memory[begin:].view(1, 5, 3, 3, dim)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    assert launch.unit(q) == unit
    for tensor in (q, k, v):
        size, (*outer, inner) = launch.strides(tensor)
        assert [size * step for step in outer] == [0, dim, 9 * dim]
        assert inner == 1
        assert tensor.data_ptr() % (2 * size) == 0
    shared = torch.from_dlpack(memory[begin:]).view(1, 5, 3, 3, dim)
    assert launch.unit(shared.permute(2, 0, 3, 1, 4)[0]) == unit
    assert launch.unit(q[..., ::2]) == 1


@pytest.mark.parametrize(
    ("shape", "grid", "copied"),
    [
        ((1, 16, 2**17, 64), (2**17,), False),
        ((1, 16, 2**20, 64), (2**10, 2**10), False),
        ((1, 16, 2**16, 64), (2, 2**15), True),
    ],
)
def test_offsets_within_a_tile_fit_in_32_bits(shape, grid, copied):
    """A tile lies in two rows of the grid; a tensor whose rows are too far apart is copied."""
    heads, dim = shape[1], shape[3]
    apart = 2**14 if copied else 3 * heads * dim
    q = torch.empty_strided(shape, (0, dim, apart, 1), device="meta")
    sizes = {"prefix": 0, "locality": "dwc_qk", "key_norm_eps": 1.0}
    site = launch.site(q, q, q, grid=grid, **sizes)
    assert (launch.near(q, site) is not q) == copied
    with pytest.raises(NodeArgumentError, match=r"expected at most \d+ columns with 16 heads"):
        launch.site(q, q, q, grid=(2, 2**21), **sizes)


def test_refused_on_a_cpu():
    q = torch.randn(1, 2, 9, 16)
    weights = [torch.randn(2, 16, 16) for _ in range(3)]
    with pytest.raises(NodeArgumentError, match=r'expected a GPU .*got cpu; use impl="auto"'):
        ttt(q, q, q, weights, scale=0.1, locality="none", impl="triton")


@pytest.mark.parametrize(
    "other",
    [{"inner": "mlp2"}, {"inner_loss": "l2"}, {"key_norm": "none"}, {"locality": "dwc_v"}],
)
def test_refused_where_there_are_no_kernels(other):
    """When the model is linearized, not when it runs."""
    settings = {"num_heads": 2, "head_dim": 8, "value_dim": 8, "scale": 1.0, "grid_ndim": 2}
    with pytest.raises(NodeArgumentError, match=r"impl: expected .* alone; got"):
        TTT(**settings, **other, impl="triton")
    shape = Shape(depth=1)
    config = t5fx.LinearizeConfig(min_tokens=0, impl="triton", **other)
    with pytest.raises(t5fx.T5Error, match="impl: expected"):
        t5fx.linearize(shape.model(), (shape.images(),), config=config)


def test_linearized_for_a_gpu_on_a_cpu():
    """As when a model is converted before it is moved."""
    shape = Shape(depth=1)
    config = t5fx.LinearizeConfig(min_tokens=0, impl="triton")
    lin = t5fx.linearize(shape.model(), (shape.images(),), config=config)
    with pytest.raises(NodeArgumentError, match=r"expected a GPU"):
        lin(shape.images())
    assert lin.to("meta")(shape.images().to("meta")).device.type == "meta"
