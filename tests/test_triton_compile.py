"""Every Triton kernel in each configuration is compiled for every architecture, without a GPU."""

import pytest
import torch

from t5fx.bench import offline
from t5fx.kernels.triton_kernels import configs

#: Share of the instructions in a tile's loop that may store and load spilled registers, by how the
#: name of the kernel begins. The sums of a gradient of the weights, 3 x D x BLOCK_M float32, stay
#: in registers over all tiles and leave little for the rest; smaller blocks spill less but convolve
#: each tile again, for twice the instructions.
SPILLS = {"inner": 0.01, "second": 0.1}
#: The rest is compiled by `make nightly`: 2 seconds each.
FREQUENT = (64, torch.bfloat16)
#: The backward's six matrices of 256 x 16 float32, the narrowest blocks that there are: 96 KiB.
TOO_LARGE = ("sm_89", 256, torch.float32)


def cases():
    for architecture in offline.TARGETS:
        for dim in configs.WIDTHS:
            for dtype in (torch.bfloat16, torch.float32):
                if (architecture, dim, dtype) == TOO_LARGE:
                    continue
                marks = [] if (dim, dtype) == FREQUENT else [pytest.mark.slow]
                yield pytest.param(architecture, dim, dtype, marks=marks)


@pytest.mark.parametrize(("architecture", "dim", "dtype"), list(cases()))
def test_resources(architecture, dim, dtype):
    launches = offline.launches(architecture, dtype, dim)
    for name, (kernel, arguments) in launches.items():
        compiled = offline.compiled(kernel, arguments, architecture)
        assert compiled.metadata.shared <= offline.SHARED_MEMORY[architecture], name
        if (architecture, dtype) == ("sm_90", torch.bfloat16) and dim in (64, 128):
            counts = offline.token_loop(offline.instructions(compiled))
            spills = SPILLS.get(name.partition("_")[0], 0)
            assert counts["LDL"] + counts["STL"] <= spills * counts.total(), name


@pytest.mark.parametrize("grid", [(4096,), (16, 16, 16)])
def test_other_grids(grid):
    launches = offline.launches("sm_90", torch.bfloat16, 32, grid=grid)
    for kernel, arguments in launches.values():
        offline.compiled(kernel, arguments, "sm_90")


def test_floats_may_be_64_bits_wide():
    """So Inductor passes them; the kernels must not compute in float64 for it."""
    for kernel, arguments in offline.launches("sm_90", torch.bfloat16, 32).values():
        if any(isinstance(value, float) for value in arguments.values()):
            compiled = offline.compiled(kernel, arguments, "sm_90", floats="fp64")
            lines = [line for line in compiled.asm["ttgir"].splitlines() if "f64" in line]
            assert lines
            assert all("tt.func" in line or "arith.truncf" in line for line in lines)


def test_sizes_may_be_64_bits_wide():
    """So Inductor passes those of which it knows no bound."""
    for kernel, arguments in offline.launches("sm_90", torch.bfloat16, 32).values():
        offline.compiled(kernel, arguments, "sm_90", sizes="i64")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_compilation_for_all_resolutions(dtype):
    """What Triton specialises on is the same on any grid and batch."""

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
