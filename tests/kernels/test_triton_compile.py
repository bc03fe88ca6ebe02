"""Every Triton kernel in each configuration is compiled for every architecture, without a GPU."""

import pytest
import torch
import triton

from t5fx.bench.gpu import offline
from t5fx.bench.gpu.hazards import hazards, is_product
from t5fx.kernels.triton_kernels import configs, launch

#: Share of the instructions in a tile's loop that may store and load spilled registers, by how the
#: name of the kernel begins. The sums of a gradient of the weights, 3 x D x BLOCK_M float32, stay
#: in registers over all tiles and leave little for the rest. Second order spills as much as it did
#: when it convolved its keys, a larger share of fewer instructions.
SPILLS = {"inner": 0.01, "second": 0.13}
#: The one kernel whose matrix instructions wait for one another, for want of registers.
SERIALISED = ("second_order_gradient_kept", 128)
#: What older versions of Triton may spill beyond that.
MORE_SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 0.03
#: Bytes of local memory that the other kernels may have. One has a few, with registers to spare.
SPILLED = 32
#: The backward's six matrices of 256 x 16 float32, the narrowest blocks that there are: 96 KiB.
TOO_LARGE = ("sm_89", 256, torch.float32)


def cases(multiply: bool):
    """(architecture, width, dtype), of kernels that multiply matrices or of the others.

    Always compiled: what multiplies bfloat16, for sm_90 in heads of 64 and 128 and for the others
    in heads of 64, once in float32; heads of 64 of the rest. The oldest torch and its Triton have
    two of them, `make nightly` has all.
    """
    for architecture in offline.TARGETS:
        for dim in configs.WIDTHS:
            for dtype in (torch.bfloat16, torch.float32):
                if (architecture, dim, dtype) == TOO_LARGE:
                    continue
                half = dtype == torch.bfloat16
                most = dim == 64 and half
                once = architecture == "sm_90" and multiply and (dim == 64 or (half and dim == 128))
                marks = []
                if architecture == "sm_89" or not (most or once):
                    marks.append(pytest.mark.slow)
                if architecture != "sm_90" or dim not in (64, 128) or not half:
                    marks.append(pytest.mark.extras)
                name = f"{architecture}-{dim}-{str(dtype).removeprefix('torch.')}"
                yield pytest.param(architecture, dim, dtype, marks=marks, id=name)


def check_resident(name, kernel, compiled, architecture, dim, dtype):
    """Work is shared out for as many programs as fit on a multiprocessor of an H100, not more; and
    for all of them, of what multiplies 16 bits in heads of 64 and 128.
    """
    if architecture == "sm_90" and kernel.__name__ in configs.HALF:
        wide = dtype == torch.float32
        programs = configs.config(kernel.__name__, architecture, dim, wide).programs
        found = offline.resident(compiled, architecture)
        assert programs <= found, name
        if "BLOCK_M" in kernel.arg_names and not wide and dim in (64, 128):
            assert programs == found, name


@pytest.mark.parametrize(("architecture", "dim", "dtype"), list(cases(multiply=True)))
def test_kernels_that_multiply(architecture, dim, dtype):
    launches = offline.launches(architecture, dtype, dim)
    for name, (kernel, arguments) in launches.items():
        if "BLOCK_M" in arguments:
            compiled = offline.compiled(kernel, arguments, architecture)
            check_resident(name, kernel, compiled, architecture, dim, dtype)
            assert compiled.metadata.shared <= offline.SHARED_MEMORY[architecture], name
            if (architecture, dtype) == ("sm_90", torch.bfloat16):
                code = offline.instructions(compiled)
                assert not hazards(code), (name, [str(hazard) for hazard in hazards(code)])
                assert any(is_product(instruction) for instruction in code), name
                if dim not in (64, 128):
                    continue
                counts = offline.token_loop(code)
                spills = SPILLS.get(name.partition("_")[0])
                limit = 0 if spills is None else spills + MORE_SPILLS
                assert counts["LDL"] + counts["STL"] <= limit * counts.total(), name
                assert not offline.serialised(code) or (name, dim) == SERIALISED, name
                if arguments.get("AHEAD"):
                    assert loads_before_products(code) == 16, name


def loads_before_products(code):
    """Loads of 16 bytes between the last two barriers before the first product of a tile, which
    goes through shared memory there: those of the next tile.
    """
    first = next(i for i, instruction in enumerate(code) if is_product(instruction))
    names = [instruction.name for instruction in code[:first]]
    start, end = [i for i, name in enumerate(names) if name.startswith("BAR.")][-2:]
    return sum(name.startswith("LDG.E.128") for name in names[start:end])


@pytest.mark.parametrize(
    "dim",
    [pytest.param(d, marks=[] if d in (64, 128) else pytest.mark.slow) for d in configs.WIDTHS],
)
def test_float16_touches_nothing_in_flight(dim):
    """As `test_kernels_that_multiply` looks at bfloat16."""
    for name, (kernel, arguments) in offline.launches("sm_90", torch.float16, dim).items():
        if "BLOCK_M" in arguments:
            code = offline.instructions(offline.compiled(kernel, arguments, "sm_90"))
            assert not hazards(code), (name, [str(hazard) for hazard in hazards(code)])
            assert any(is_product(instruction) for instruction in code), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", configs.KEPT)
def test_keys_that_were_not_kept(dim, dtype, monkeypatch):
    """A backward may have to convolve them again."""
    monkeypatch.setattr(configs, "KEPT", ())
    kernel, arguments = offline.launches("sm_90", dtype, dim)["second_order_gradient"]
    compiled = offline.compiled(kernel, arguments, "sm_90")
    assert compiled.metadata.shared <= offline.SHARED_MEMORY["sm_90"]
    code = offline.instructions(compiled)
    assert not hazards(code), [str(hazard) for hazard in hazards(code)]


@pytest.mark.parametrize(
    "dim", [64, *(pytest.param(d, marks=pytest.mark.slow) for d in (16, 32, 128, 256))]
)
@pytest.mark.extras
def test_tf32(dim, monkeypatch):
    """What float32 is multiplied by where the user lets cuBLAS use tf32: matrix instructions."""
    monkeypatch.setattr(launch, "precision", lambda: "tf32")
    for name, (kernel, arguments) in offline.launches("sm_90", torch.float32, dim).items():
        if "BLOCK_M" in arguments:
            compiled = offline.compiled(kernel, arguments, "sm_90")
            assert compiled.metadata.shared <= offline.SHARED_MEMORY["sm_90"], name
            code = offline.instructions(compiled)
            assert any("MMA" in i.name and "TF32" in i.name for i in code), name
            assert not hazards(code), (name, [str(hazard) for hazard in hazards(code)])


#: Widths of q and k, and of v, that pad to different ones or to none of their own.
PAIRS = [(16, 64), (8, 64), (16, 128), (16, 256), (64, 16), (128, 16), (256, 16), (24, 40)]


@pytest.mark.extras
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float16, torch.float32)),
    ],
)
@pytest.mark.parametrize(
    ("dim", "value_dim"),
    [pytest.param(*pair, marks=[] if pair == (24, 40) else pytest.mark.slow) for pair in PAIRS],
)
def test_odd_pairs_of_widths(dim, value_dim, dtype):
    launches = offline.launches("sm_90", dtype, dim, value_dim=value_dim, grid=(8, 8), heads=4)
    for name, (kernel, arguments) in launches.items():
        if "BLOCK_M" in arguments:
            compiled = offline.compiled(kernel, arguments, "sm_90")
            assert compiled.metadata.shared <= offline.SHARED_MEMORY["sm_90"], name
            code = offline.instructions(compiled)
            assert not hazards(code), (name, [str(hazard) for hazard in hazards(code)])


@pytest.mark.parametrize(("architecture", "dim", "dtype"), list(cases(multiply=False)))
def test_other_kernels(architecture, dim, dtype):
    launches = offline.launches(architecture, dtype, dim)
    for name, (kernel, arguments) in launches.items():
        if "BLOCK_M" not in arguments:
            compiled = offline.compiled(kernel, arguments, architecture)
            check_resident(name, kernel, compiled, architecture, dim, dtype)
            assert compiled.metadata.shared <= offline.SHARED_MEMORY[architecture], name
            if architecture.startswith("sm_"):
                assert offline.spilled(compiled) <= SPILLED, name


@pytest.mark.extras
@pytest.mark.parametrize("grid", [pytest.param((4096,), marks=pytest.mark.slow), (16, 16, 16)])
def test_other_grids(grid):
    launches = offline.launches("sm_90", torch.bfloat16, 32, grid=grid)
    for kernel, arguments in launches.values():
        offline.compiled(kernel, arguments, "sm_90")


@pytest.mark.extras
def test_floats_and_sizes_may_be_64_bits_wide():
    """So Inductor passes floats, and sizes of which it knows no bound; the kernels must not compute
    in float64 for it.
    """
    for kernel, arguments in offline.launches("sm_90", torch.bfloat16, 32).values():
        compiled = offline.compiled(kernel, arguments, "sm_90", floats="fp64", sizes="i64")
        lines = [line for line in compiled.asm["ttgir"].splitlines() if "f64" in line]
        assert bool(lines) == any(isinstance(value, float) for value in arguments.values())
        assert all("tt.func" in line or "arith.truncf" in line for line in lines)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_compilation_for_all_resolutions(dtype):
    """What Triton specialises on is the same on any grid and batch, in direct calls; Inductor has
    ideas of its own (``tiles.SIZES``).
    """

    def keys(grid, batch):
        launches = offline.launches("sm_90", dtype, 64, grid=grid, batch=batch)
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
