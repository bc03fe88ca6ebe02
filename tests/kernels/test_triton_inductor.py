"""What Inductor would run on an H100 of an attention block with our node: how often what is
launched, that nothing is copied around our kernels, and that all of it compiles.
"""

import collections

import pytest
import torch
from h100 import Code, generated, only_moves
from torch import nn

from t5fx.kernels import TTT

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

#: Launches of our own kernels, by phase. A change of the kernels changes them here.
#: Forward: tables and partial statistics of the keys, key norm, inner gradient, its sum, output.
#: Backward: inner gradient of the queries and its sum, second order and its sum, the convolution's
#: gradient of queries and of keys, the key norm's.
OURS = {"inference": 5, "forward": 5, "backward": 7}
#: Kernels of Inductor's that read what ours wrote in a backward, at most. Sums of the convolutions'
#: gradients over the programs, of queries and of keys, 2; the gradient of the joint projection's
#: output, of which those of q, k and v are a third each, 1; with a norm of q and k its backward
#: reads them too: 2 for its inputs and 2 for its own parameters.
READERS = {"plain": 3, "query norm": 7}
#: Casts of the gradients of two convolutions, weight and bias each, to the parameters' dtype.
SMALL_MOVES = 4
#: Products of a block: qkv and projection; in a backward two each.
PRODUCTS = {"inference": 2, "forward": 2, "backward": 4}


class Block(nn.Module):
    """x + attention(norm(x)), the attention a node as kernels."""

    def __init__(self, *, heads: int, dim: int, query_norm: bool):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.norm = nn.LayerNorm(heads * dim)
        self.qkv = nn.Linear(heads * dim, 3 * heads * dim)
        self.query_norm = nn.LayerNorm(dim) if query_norm else nn.Identity()
        self.t5 = TTT(heads, dim, dim, scale=dim**-0.5, grid_ndim=2, impl="triton")
        self.proj = nn.Linear(heads * dim, heads * dim)

    def forward(self, x, image):
        """x [B, 1 + H*W, heads * dim], image [H, W]."""
        qkv = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, self.dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.query_norm(q), self.query_norm(k)
        out = self.t5(q, k, v, grid=image.shape, prefix=1)
        return x + self.proj(out.transpose(1, 2).flatten(2))


def phases(*, dynamic, training, query_norm, dim=64, dtype=torch.bfloat16, batch=2):
    """{phase: (code, numbers in q)}."""
    block = Block(heads=2, dim=dim, query_norm=query_norm).to(dtype)
    x = torch.randn(batch, 1 + 14 * 15, 2 * dim, dtype=dtype, requires_grad=training)
    codes = generated(block, x, torch.empty(14, 15), dynamic=dynamic, training=training)
    names = ("forward", "backward") if training else ("inference",)
    return {name: (code, x.numel()) for name, code in zip(names, codes, strict=True)}


def read_of_ours(code: Code) -> list[str]:
    """Kernels of Inductor's whose arguments one of ours wrote: what it was the first to use."""
    writers: dict[str, bool] = {}
    readers = []
    for launch in code.launches:
        ours = code.is_ours(launch.name)
        if not ours and any(writers.get(tensor) for tensor in code.reads(launch)):
            readers.append(launch.name)
        for tensor in [*launch.tensors, *([launch.out] if launch.out else [])]:
            if tensor.startswith("buf"):
                writers.setdefault(tensor, ours)
    return readers


CASES = [
    pytest.param(dynamic, training, query_norm, marks=marks, id=name)
    for dynamic, training, query_norm, marks, name in (
        (True, True, False, [pytest.mark.extras], "dynamic-training-plain"),
        (False, False, True, [], "static-inference-query_norm"),
        (False, True, True, [pytest.mark.extras, pytest.mark.slow], "static-training-query_norm"),
        (False, True, False, [pytest.mark.slow], "static-training-plain"),
        (False, False, False, [pytest.mark.slow], "static-inference-plain"),
        (True, False, False, [pytest.mark.slow], "dynamic-inference-plain"),
        (True, False, True, [pytest.mark.slow], "dynamic-inference-query_norm"),
        (True, True, True, [pytest.mark.slow], "dynamic-training-query_norm"),
    )
]


@pytest.mark.parametrize(("dynamic", "training", "query_norm"), CASES)
def test_what_an_h100_would_run(dynamic, training, query_norm, tmp_path):
    found = phases(dynamic=dynamic, training=training, query_norm=query_norm)
    for phase, (code, numbers) in found.items():
        assert len(code.ours) == OURS[phase], phase
        assert len(code.libraries) == PRODUCTS[phase]
        # Nothing of the size of q is moved without being computed with: neither q, k and v before
        # our kernels nor what they write.
        assert not code.copies(numbers)
        moves = [x for x in code.fused if only_moves(code.kernels[x.name])]
        assert len(moves) <= (SMALL_MOVES if phase == "backward" else 0)
        if phase == "backward":
            fused = [name for name in read_of_ours(code) if name in code.kernels]
            assert len(fused) <= READERS["query norm" if query_norm else "plain"], fused
        else:
            # The output goes straight into the projection, and v straight from the other one.
            assert read_of_ours(code) == ["addmm"]
            first = next(x for x in code.libraries if x.out)
            reads = collections.Counter(t for x in code.ours for t in x.tensors)
            assert reads[first.out] >= (1 if query_norm else 3)
        # 1, known when a graph is made, is a constant of the kernel: other code than eager's.
        assert "'prefix': 1" in code.source
        # The convolved keys are written to be trained, and only then.
        assert ("'KEEP': True" in code.source) == (phase == "forward")
        assert ("'KEPT': True" in code.source) == (phase == "backward")
        assert set(code.compiled(tmp_path)) == set(code.kernels)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_it_compiles_for_one_image(dim, dtype, tmp_path):
    """With a batch of one even more sizes are constants."""
    found = phases(dynamic=False, training=True, query_norm=False, dim=dim, dtype=dtype, batch=1)
    for code, _ in found.values():
        code.compiled(tmp_path)


COPY = """
def kernel(in_ptr0, out_ptr0, xnumel, XBLOCK: tl.constexpr):
    tmp0 = tl.load(in_ptr0 + (x0), xmask).to(tl.float32)
    tmp1 = {}
    tl.store(out_ptr0 + (x0), tmp1, xmask)
"""


@pytest.mark.parametrize(
    ("value", "moves"),
    [("tmp0.to(tl.bfloat16)", True), ("tmp0", True), ("tmp0 + tmp0", False), ("-tmp0", False)],
)
def test_what_only_moves(value, moves):
    assert only_moves(COPY.format(value)) == moves
