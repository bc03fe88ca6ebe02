"""Tile sizes and launch settings of each kernel, by architecture, as data.

No row below has been measured yet. They were chosen by what the offline compiler makes of them for
sm_90, 16-bit products and widths of 64 and 128: the fewest instructions (docs/roofline.md), then
the most warps on a multiprocessor; two parts where the products of one would be serialised. Where a
tile has fewer than 16 tokens for each warp, products in a row are computed twice. Tiles are loaded
ahead where that costs no program its room and nothing is spilled for it: `inner_gradient`, with all
registers in use, would spill 3 % of its instructions in heads of 64 and 18 % in those of 128. The
other rows are guesses that fit: tests/kernels/test_triton_compile.py builds each of them for five
architectures and holds it to the architecture's shared memory, and the programs of the rows for
sm_90 to what fits on a multiprocessor by registers, shared memory and warps
(``bench.gpu.offline.resident``): never more, and all of them where 16 bits are multiplied in heads
of 64 and 128. ``python -m t5fx.bench.gpu.tune`` measures on a GPU; the rows it finds go to
``MEASURED`` with the GPU and the versions they were found on.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """How one kernel is launched."""

    block_n: int  # tokens in a tile
    block_m: int  # hidden units in a block
    warps: int
    stages: int  # depth of the software pipeline
    programs: int  # resident on a multiprocessor: what its registers and shared memory allow
    unroll: bool = True  # the convolution's loop over columns: see ``convolution.add_frame``
    parts: int = 1  # of a block of hidden units: see ``second_order``
    ahead: int = 0  # what of the next tile is loaded before this one's products: see ``window``

    def launched(self) -> dict[str, int]:
        """The arguments of a kernel that multiplies no matrices."""
        return {"BLOCK_N": self.block_n, "num_warps": self.warps, "num_stages": self.stages}


#: Widths that a head is padded to.
WIDTHS = (16, 32, 64, 128, 256)

#: By kernel, then by the width that a head is padded to, for products of float16 and bfloat16.
HALF = {
    "prepare": {
        16: Config(256, 0, 4, 1, 4),
        32: Config(128, 0, 4, 1, 4),
        64: Config(64, 0, 4, 1, 4),
        128: Config(32, 0, 4, 1, 4),
        256: Config(16, 0, 4, 1, 4),
    },
    "inner_gradient": {
        16: Config(64, 16, 4, 1, 4),
        32: Config(64, 32, 4, 1, 2),
        64: Config(64, 64, 4, 1, 2),
        128: Config(128, 64, 8, 1, 1, unroll=False),
        256: Config(64, 32, 8, 1, 1, unroll=False),
    },
    "query_output": {
        16: Config(64, 16, 4, 1, 10),
        32: Config(64, 32, 4, 1, 4),
        64: Config(64, 64, 4, 1, 3, ahead=2),
        128: Config(64, 128, 4, 1, 2, ahead=1),
        256: Config(128, 32, 8, 1, 1, unroll=False),
    },
    "second_order_gradient": {
        16: Config(64, 16, 4, 1, 2),
        32: Config(64, 32, 4, 1, 2),
        64: Config(128, 64, 8, 1, 1, parts=2),
        128: Config(128, 64, 8, 1, 1, unroll=False),
        256: Config(64, 32, 8, 1, 1),
    },
    "convolution_gradient": {
        16: Config(128, 0, 4, 1, 2),
        32: Config(64, 0, 4, 1, 2),
        64: Config(32, 0, 4, 1, 2),
        128: Config(16, 0, 4, 1, 2),
        256: Config(8, 0, 4, 1, 2),
    },
    "key_norm_gradient": {
        16: Config(256, 0, 4, 1, 4),
        32: Config(128, 0, 4, 1, 4),
        64: Config(64, 0, 4, 1, 4),
        128: Config(32, 0, 4, 1, 4),
        256: Config(16, 0, 4, 1, 4),
    },
}

#: The same for GPUs with less shared memory than Hopper's 227 KiB a program, and for unknown ones:
#: what fits in 99 KiB.
SMALL = HALF | {
    "inner_gradient": HALF["inner_gradient"]
    | {
        128: Config(64, 32, 4, 1, 2),
        256: Config(32, 16, 4, 1, 2),
    },
    "query_output": HALF["query_output"]
    | {
        64: Config(64, 64, 4, 1, 2),
        128: Config(64, 32, 4, 1, 2),
        256: Config(32, 32, 4, 1, 2),
    },
    "second_order_gradient": HALF["second_order_gradient"]
    | {
        64: Config(64, 32, 4, 1, 2),
        128: Config(32, 32, 4, 1, 1),
        256: Config(16, 16, 4, 1, 1),
    },
}
#: Architectures that have it all.
LARGE = ("sm_90", "sm_100", "sm_103")

#: The same for products of float32, which have no tensor cores: every multiply-add is unrolled, so
#: that tiles must stay small.
WIDE = HALF | {
    "inner_gradient": {
        16: Config(32, 16, 4, 1, 4),
        32: Config(32, 32, 4, 1, 2),
        64: Config(32, 32, 4, 1, 2),
        128: Config(32, 32, 8, 1, 1),
        256: Config(16, 16, 8, 1, 1),
    },
    "query_output": {
        16: Config(32, 16, 4, 1, 5),
        32: Config(32, 32, 4, 1, 6),
        64: Config(32, 32, 4, 1, 4),
        128: Config(32, 32, 8, 1, 2),
        256: Config(16, 16, 8, 1, 2),
    },
    "second_order_gradient": {
        16: Config(32, 16, 4, 1, 3),
        32: Config(32, 32, 4, 1, 2),
        64: Config(32, 32, 8, 1, 1),
        128: Config(16, 16, 8, 1, 1),
        256: Config(16, 16, 8, 1, 1),
    },
    "key_norm_gradient": {
        width: row._replace(programs=3) for width, row in HALF["key_norm_gradient"].items()
    },
}

#: Rows that a measurement on an architecture put in place of the above, by (architecture, kernel,
#: width, wide): none yet.
MEASURED: dict[tuple[str, str, int, bool], Config] = {}


#: Widths of heads whose convolved keys a forward that is trained keeps for ``second_order``, where
#: each block of hidden units would convolve them again in a loop that lacks registers.
KEPT = (64, 128, 256)


def keeps_keys(width: int, conv_ndim: int) -> bool:
    """Whether a forward that is trained keeps the convolved keys: not without a convolution."""
    return width in KEPT and conv_ndim > 0


def config(kernel: str, architecture: str, width: int, wide: bool) -> Config:
    """The settings of a kernel on an architecture ("sm_90", "gfx942", ...)."""
    half = HALF if architecture in LARGE else SMALL
    default = (WIDE if wide else half)[kernel][width]
    return MEASURED.get((architecture, kernel, width, wide), default)
