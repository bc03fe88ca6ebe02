"""Near attention's Triton kernels as compilers see them, without a GPU, and compiled on one. Their
results in Triton's interpreter are in triton_near.py, which test_triton.py runs.
"""

import re

import pytest
import torch
from h100 import generated, pretended
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

from t5fx.bench.gpu import offline
from t5fx.bench.gpu.hazards import hazards
from t5fx.kernels import TTT
from t5fx.kernels.triton_kernels import configs, near_parity
from t5fx.kernels.triton_kernels.near_parity import NearCase

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

#: Bytes of local memory that a kernel may have in heads of 64 and 128 and products of bfloat16.
SPILLED = 256


def cases():
    """(architecture, width, dtype, other settings)."""
    half, single = torch.bfloat16, torch.float32
    chosen = [("sm_90", 64, half), ("sm_90", 128, half)]
    every = [(a, d, t) for a in offline.TARGETS for d in configs.WIDTHS for t in (half, single)]
    for architecture, dim, dtype in every:
        marks = [] if (architecture, dim, dtype) in chosen else [pytest.mark.slow]
        name = f"{architecture}-{dim}-{str(dtype).removeprefix('torch.')}"
        yield pytest.param(architecture, dim, dtype, {}, marks=marks, id=name)
    for name, settings in (
        ("one axis", {"grid": (4096,)}),
        ("three axes", {"grid": (16, 16, 16), "neighborhood": 3}),
        ("window alone", {"coarse": 0}),
        ("cells alone", {"neighborhood": 0}),
        ("half, nothing off the grid", {"gated": False, "prefix": 0}),
        ("many cells", {"coarse": 11}),
    ):
        yield pytest.param("sm_90", 64, half, settings, marks=pytest.mark.slow, id=name)
    yield pytest.param(
        "sm_90", 64, torch.float16, {}, marks=pytest.mark.slow, id="sm_90-64-float16"
    )


@pytest.mark.parametrize(("architecture", "dim", "dtype", "settings"), list(cases()))
def test_they_compile(architecture, dim, dtype, settings):
    """Heads of 128 as Inductor passes floats, and sizes of which it knows no bound: in 64 bits. The
    kernels must not compute in float64 for it.
    """
    numbers = {"floats": "fp64", "sizes": "i64"} if dim == 128 else {}
    launches = offline.near_launches(architecture, dtype, dim, **settings)
    for name, (kernel, arguments) in launches.items():
        compiled = offline.compiled(kernel, arguments, architecture, **numbers)
        assert compiled.metadata.shared <= offline.SHARED_MEMORY[architecture], name
        lines = [line for line in compiled.asm["ttgir"].splitlines() if "f64" in line]
        assert all("tt.func" in line or "arith.truncf" in line for line in lines), name
        if (architecture, dtype) == ("sm_90", torch.bfloat16):
            code = offline.instructions(compiled)
            assert not hazards(code), (name, [str(hazard) for hazard in hazards(code)])
            assert name == "near_means" or any("MMA" in i.name for i in code), name
            if dim in (64, 128) and not settings:
                assert offline.spilled(compiled) <= SPILLED, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_compilation_for_all_resolutions(dtype):
    def keys(grid, batch):
        launches = offline.near_launches("sm_90", dtype, 64, grid=grid, batch=batch)
        return {
            name: [specialised(parameter, arguments[parameter.name]) for parameter in kernel.params]
            for name, (kernel, arguments) in launches.items()
        }

    def specialised(parameter, value):
        if isinstance(value, torch.Tensor) or parameter.is_constexpr:
            return str(getattr(value, "dtype", value))
        if isinstance(value, float) or parameter.do_not_specialize:
            return None
        return value == 1, value % 16 == 0

    assert keys((64, 64), 2) == keys((33, 17), 8) == keys((1, 1), 1)


#: Launches of near attention's, by phase.
FORWARD = ["near_exact", "near_means", "near_queries"]
BACKWARD = [
    *("near_exact_gradient", "near_key_gradient", "near_query_gradient"),
    "near_shared_gradient",
]
#: What they write.
WRITTEN = {
    "near_means": {"mean_k", "mean_v"},
    "near_queries": {"out", "lse"},
    "near_exact": {"out", "lse"},
    "near_query_gradient": {"delta", "shares", "slopes", "dq"},
    "near_exact_gradient": {"delta", "dq"},
    "near_shared_gradient": {"partial"},
    "near_key_gradient": {"dk", "dv"},
}


class Attention(nn.Module):
    def __init__(self, mix):
        super().__init__()
        near = {"neighborhood": 3, "coarse": 2, "mix": mix}
        self.t5 = TTT(2, 64, 64, scale=0.125, grid_ndim=2, impl="triton", **near)

    def forward(self, qkv, image):
        """qkv [B, 1 + H*W, 3*128], image [H, W]."""
        q, k, v = qkv.unflatten(2, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        out = self.t5(q, k, v, grid=image.shape, prefix=1)
        return out.transpose(1, 2).flatten(2)


def near_alone(x, gate, image):
    """x [4, B, H, N, D]: q, k, v and what the attention is joined with."""
    q, k, v, base = x.unbind()
    forward = torch.ops.t5fx.near_triton_forward
    return forward(q, k, v, base, [gate], 0.125, list(image.shape), 1, 3, 2)[0]


@pytest.mark.extras
def test_one_graph_of_launches_for_all_resolutions():
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
    compiled = torch.compile(near_alone, backend=backend, fullgraph=True, dynamic=True)
    gate = torch.ones(2, requires_grad=True)
    with pretended():
        for height, width in ((14, 15), (20, 21)):
            x = torch.randn(4, 2, 2, 1 + height * width, 64, requires_grad=True)
            out = compiled(x, gate, torch.empty(height, width))
            if len(graphs) == 1:
                out.sum().backward()
    assert len(graphs) == 2  # forward and backward, of both resolutions
    for graph, wanted in zip(graphs, (FORWARD, BACKWARD), strict=True):
        nodes = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
        kernels = [kernel_side_table.get_kernel(n.kwargs["kernel_idx"]).fn.__name__ for n in nodes]
        assert sorted(kernels) == wanted
        # torch copies what it takes to be written to.
        for kernel, node in zip(kernels, nodes, strict=True):
            assert set(node.kwargs["tensors_to_clone"]) == WRITTEN[kernel], kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dynamic", "training", "mix"),
    [(True, True, "gate"), (False, True, "half"), (False, False, "gate")],
)
def test_what_an_h100_would_run(dynamic, training, mix, tmp_path):
    """Inductor has the launches themselves, and copies nothing for them."""
    qkv = torch.randn(2, 1 + 14 * 15, 384, dtype=torch.bfloat16, requires_grad=training)
    block = Attention(mix).bfloat16()
    codes = generated(block, qkv, torch.empty(14, 15), dynamic=dynamic, training=training)
    for code, wanted in zip(codes, [FORWARD, BACKWARD], strict=False):
        names = [re.sub(r"_\d+$", "", launch.name) for launch in code.ours]
        assert sorted(name for name in names if name.startswith("near")) == wanted
        assert not code.copies(qkv.numel() // 3)
        code.compiled(tmp_path)


CASES = {
    "plain": {},
    "no prefix": {"prefix": 0, "suffix": 0, "mix": "half"},
    "many off the grid": {"prefix": 77, "suffix": 70},
    "one axis": {"grid": (1000,), "neighborhood": 9},
    "three axes": {"grid": (5, 6, 7)},
    "short": {"grid": (2, 40), "neighborhood": 5, "coarse": 4},
    "window alone": {"coarse": 0},
    "cells alone": {"neighborhood": 0, "coarse": 4},
    "large": {"grid": (120, 130), "neighborhood": 7, "coarse": 4, "batch": 1},
    "small gradient": {"gradient": 2**-13},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [16, 64, 72, 128, 256])
def test_widths_on_a_gpu(dim, dtype):
    found = near_parity.compare(
        NearCase(head_dim=dim, value_dim=dim, dtype=dtype), "cuda", repeats=2
    )
    assert found.ok, str(found)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [None, "static", "dynamic"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_cases_on_a_gpu(name, dtype, compiled):
    found = near_parity.compare(NearCase(dtype=dtype, **CASES[name]), "cuda", compiled=compiled)
    assert found.ok, str(found)


@pytest.mark.gpu
def test_opcheck():
    case = NearCase(head_dim=16, value_dim=20, grid=(4, 4), suffix=1, dtype="float32")
    tensors, keywords, grad = near_parity.arguments(case, "cuda")
    rest = [list(x) if isinstance(x, tuple) else x for x in keywords.values()]
    q, k, v, base, gate = tensors
    operators = torch.ops.t5fx
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = torch.library.opcheck(
        operators.near_triton_forward.default, (*leaves[:4], leaves[4:], *rest)
    )
    assert set(results.values()) == {"SUCCESS"}
    _, *saved = operators.near_triton_forward(q, k, v, base, [gate], *rest)
    results = torch.library.opcheck(
        operators.near_triton_backward.default, (grad, q, k, v, [gate], saved, *rest)
    )
    assert set(results.values()) == {"SUCCESS"}
