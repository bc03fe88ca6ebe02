"""How the Triton kernels share tiles out among programs, on GPUs of several sizes, without one."""

from unittest import mock

import pytest
import torch
import triton

from t5fx.kernels.triton_kernels import backward, configs, forward, launch
from t5fx.kernels.triton_kernels.share import best_chunk, best_rounds, ceil_div

GRIDS = {1024: (32, 32), 4096: (64, 64), 8192: (64, 128), 16384: (128, 128), 65536: (256, 256)}
GROUPS = [(1, 6), (1, 12), (1, 16), (1, 24), (2, 12), (8, 16)]
#: Of an A100, an H100 and a B200.
MULTIPROCESSORS = [108, 132, 148]


def launches(batch, heads, tokens, dim, multiprocessors):
    """(kernel, arguments, programs) of each launch of a forward and a backward."""
    found = []

    def record(kernel, *args, grid, warmup, **settings):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | settings
        found.append((kernel.__name__, arguments, grid[0]))

    def empty(*sizes):
        return torch.empty(sizes, dtype=torch.bfloat16, device="meta")

    q, k, v = empty(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
    weights = [empty(heads, dim, dim)] * 3
    conv = [empty(heads * dim, 1, 3, 3), empty(heads * dim)] * 2
    settings = {"scale": 0.1, "grid": GRIDS[tokens], "prefix": 0, "key_norm_eps": 1.0}
    settings["locality"] = "dwc_qk"
    with (
        mock.patch("torch.library.wrap_triton", lambda kernel: kernel),
        mock.patch.object(triton.JITFunction, "run", record),
        mock.patch.object(launch, "architecture", return_value="sm_90"),
        mock.patch.object(launch, "multiprocessors", return_value=multiprocessors),
    ):
        out, saved = forward(q, k, v, weights, conv, **settings)
        backward(out, q, k, v, weights, conv, saved, **settings)
    return found


def duration(tiles, groups, slots, chunk):
    """Rounds x chunk."""
    return ceil_div(groups * ceil_div(tiles, chunk), slots) * chunk


def best(tiles, groups, slots):
    """(the shortest duration of all chunks, the largest chunk that has it)."""
    shortest, chunk = min(
        (duration(tiles, groups, slots, chunk), -chunk) for chunk in range(1, tiles + 1)
    )
    return shortest, -chunk


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", GRIDS)
@pytest.mark.parametrize(("batch", "heads"), GROUPS)
def test_no_round_is_wasted(batch, heads, tokens, dim):
    """Rounds x chunk of each kernel is at most 1.15 of what the best chunk would have."""
    for multiprocessors in MULTIPROCESSORS:
        seen = set()
        for name, arguments, programs in launches(batch, heads, tokens, dim, multiprocessors):
            if name not in configs.HALF:
                continue
            seen.add(name)
            block = arguments["BLOCK_N"]
            tiles = arguments.get("tiles", ceil_div(tokens, block))
            chunk = arguments["chunk"] // (1 if "tiles" in arguments else block)
            assert arguments["splits"] == ceil_div(tiles, chunk)
            groups = programs // arguments["splits"]
            shared_among = name == "inner_gradient" and arguments["KEYS"]
            blocks = dim // arguments["BLOCK_M"] if shared_among else 1
            assert groups == batch * heads * blocks
            slots = configs.config(name, "sm_90", dim, False).programs * multiprocessors
            shortest, _ = best(tiles, groups, slots)
            assert duration(tiles, groups, slots, chunk) <= 1.15 * shortest, (name, slots)
        assert seen == set(configs.HALF)


@pytest.mark.parametrize("tiles", [1, 2, 7, 64, 129, 1000])
@pytest.mark.parametrize("groups", [1, 12, 24, 100, 264])
@pytest.mark.parametrize("slots", [4, 132, 264])
def test_of_equal_chunks_the_largest(tiles, groups, slots):
    """Fewer programs load fewer weights and write fewer sums."""
    chunk = best_chunk(tiles, groups, slots)
    shortest, largest = best(tiles, groups, slots)
    took = duration(tiles, groups, slots, chunk)
    assert took <= 1.15 * shortest
    assert took > shortest or chunk == largest


def test_symbolic_sizes_are_not_compared():
    """The chunk is an expression; at the sizes traced with it is that of integers."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    shapes = ShapeEnv()
    tiles, groups = (
        shapes.create_symintnode(
            shapes.create_symbol(size, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC),
            hint=size,
        )
        for name, size in (("tiles", 256), ("groups", 24))
    )
    for number in (24, groups):
        chunk = best_chunk(tiles, number, 132)
        assert isinstance(chunk, torch.SymInt)
        assert chunk.node.hint == best_chunk(256, 24, 132) == 24
        assert chunk.node.expr.has(tiles.node.expr)
    assert not shapes.guards
    # At other sizes with as many rounds.
    rounds = best_rounds(256, 24, 132)
    expression = best_chunk(tiles, 24, 132).node.expr
    assert expression.subs(tiles.node.expr, 1000) == ceil_div(1000, rounds * 132 // 24)
