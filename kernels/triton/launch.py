"""What the launchers of the kernels share: sizes, settings and the launch itself."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..errors import NodeArgumentError
from .configs import Config, config
from .reduction import sum_matrices
from .share import best_chunk, ceil_div

#: The widest head that the kernels take, in channels.
MAX_WIDTH = 256
#: Key norms with less than this beside the variance are computed with the mean subtracted first.
SMALL_EPS = 0.05
#: Elements that one program of the reduction sums up.
SUM_BLOCK = 256
#: Triton's interpreter takes any device; it is chosen before the kernels are imported.
INTERPRETED = not isinstance(sum_matrices, triton.JITFunction)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

P = ParamSpec("P")
R = TypeVar("R")


class Parts(NamedTuple):
    """How the tiles of a (batch item, head) are shared out."""

    chunk: int  # tiles of one program
    splits: int  # programs
    tiles: int


@dataclass(frozen=True)
class Site:
    """Sizes of one call; those of tokens and batch may be symbolic."""

    device: torch.device
    batch: int
    heads: int
    tokens: int
    dim: int
    value_dim: int
    conv_ndim: int  # 0: no convolution
    prefix: int  # without a convolution all tokens
    grid: tuple[int, ...]  # of three axes, missing ones first, of size 1
    wide: bool  # products of float32
    tanh: bool  # silu by the GPU's own tanh
    scaled: bool  # products of float16: see ``tiles.power_of_two``
    centred: bool  # the mean of the keys is subtracted before all else: see ``convolved_tile``

    @functools.cached_property
    def groups(self) -> int:
        """Pairs of batch item and head."""
        return self.batch * self.heads

    @property
    def matrices(self) -> int:
        """Numbers in the three weights of a head."""
        return self.dim * (2 * self.dim + self.value_dim)

    @functools.cached_property
    def axes(self) -> tuple[int, ...]:
        """The sizes of the grid; none without a convolution."""
        return self.grid[3 - self.conv_ndim :]

    @functools.cached_property
    def num_quads(self) -> int:
        """Quads of tokens (see ``tiles``); 0 without a convolution."""
        return quad_count(self.axes) if self.conv_ndim else 0

    def places(self, quads: Tensor) -> tuple[Any, ...]:
        """What kernels that convolve are told of the tokens."""
        grid_tokens = math.prod(self.grid) if self.conv_ndim else 0
        return quads, self.num_quads, self.prefix, grid_tokens, self.tokens, *self.grid[1:]

    @property
    def taps(self) -> int:
        """In a convolution's kernel; 0 without one."""
        return 3**self.conv_ndim if self.conv_ndim else 0

    def config(self, kernel: str) -> Config:
        width = padded(max(self.dim, self.value_dim))
        return config(kernel, architecture(self.device), width, self.wide)

    def chunks(self, settings: Config, blocks: int = 1) -> tuple[int, int]:
        """(tokens in a chunk, number of chunks), each with ``blocks`` programs."""
        tiles = ceil_div(self.tokens, settings.block_n)
        chunk = self._chunk(tiles, settings, blocks) * settings.block_n
        return chunk, ceil_div(self.tokens, chunk)

    def tile_chunks(self, settings: Config, blocks: int = 1) -> Parts:
        """The chunks of the kernels that convolve, which count in tiles instead of tokens."""
        tokens = settings.block_n
        tiles = ceil_div(self.prefix, tokens)
        if self.conv_ndim:
            behind = self.tokens - self.prefix - math.prod(self.grid)
            tiles += ceil_div(self.num_quads, tokens // 4) + ceil_div(behind, tokens)
        chunk = self._chunk(tiles, settings, blocks)
        return Parts(chunk, ceil_div(tiles, chunk), tiles)

    def _chunk(self, tiles: int, settings: Config, blocks: int) -> int:
        slots = settings.programs * multiprocessors(self.device)
        return best_chunk(tiles, self.groups * blocks, slots)

    def shape(self, kernel: str) -> dict[str, Any]:
        """The compile-time arguments of a kernel that multiplies matrices."""
        settings = self.config(kernel)
        return {
            "D": self.dim,
            "DV": self.value_dim,
            "NDIM": self.conv_ndim,
            "WIDE": self.wide,
            "PRECISION": precision(),
            "TANH": self.tanh,
            "UNROLL": settings.unroll,
            "BLOCK_M": min(settings.block_m, padded(self.dim)),
            "BLOCK_D": padded(self.dim),
            "BLOCK_V": padded(self.value_dim),
            **settings.launched(),
        }

    def hidden_blocks(self, kernel: str) -> int:
        """How many blocks of hidden units a kernel has."""
        return ceil_div(self.dim, self.shape(kernel)["BLOCK_M"])


def site(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    prefix: int,
    locality: str,
    key_norm_eps: float,
) -> Site:
    """The sizes of a call.

    Raises:
        NodeArgumentError: a device, a dtype, a width of heads or a locality that the kernels do not
            know.
    """
    check_inputs(q, k, v)
    if locality not in ("dwc_qk", "none"):
        raise NodeArgumentError(
            f'locality: expected "dwc_qk" or "none" with impl="triton"; got {locality!r}; use '
            'impl="reference"'
        )
    convolved = locality == "dwc_qk"
    axes = tuple(grid) if convolved else ()
    batch, heads, tokens, dim = q.shape
    check_reach(axes, int(heads), int(max(dim, v.shape[3])))
    return Site(
        device=q.device,
        batch=batch,
        heads=int(heads),
        tokens=tokens,
        dim=int(dim),
        value_dim=int(v.shape[3]),
        conv_ndim=len(axes),
        prefix=prefix if convolved else tokens,
        grid=((1,) * (3 - len(axes)) + axes),
        wide=is_wide(q, k, v),
        tanh=is_tanh(q, k, v),
        scaled=is_scaled(q, k, v),
        centred=is_centred(q, k, v, key_norm_eps),
    )


def is_wide(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether products are of float32: unless q, k and v share a 16-bit dtype."""
    return q.dtype == torch.float32 or not q.dtype == k.dtype == v.dtype


def is_tanh(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether silu is by the GPU's own tanh (``tiles.tanh``): NVIDIA's, for products of bfloat16,
    whose rounding hides its error.
    """
    rounded = q.dtype == torch.bfloat16 and not is_wide(q, k, v)
    return rounded and architecture(q.device).startswith("sm_")


def is_scaled(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether what is multiplied is scaled by powers of two: in float16, in which what is smaller
    than 6e-5 loses digits.
    """
    return q.dtype == torch.float16 and not is_wide(q, k, v)


def largest(tensor: Tensor, shape: Site) -> Tensor:
    """The largest magnitude in each (batch item, head) of ``[B, H, N, C]``, ``[B, H]`` float32;
    empty where nothing is scaled.
    """
    if not shape.scaled:
        return tensor.new_empty(shape.batch, 0, dtype=torch.float32)
    infinity = math.inf
    return torch.linalg.vector_norm(tensor, infinity, (2, 3), dtype=torch.float32)


def is_centred(q: Tensor, k: Tensor, v: Tensor, key_norm_eps: float) -> bool:
    """Whether the mean of the keys is subtracted before the convolution.

    After it costs |mean| / sqrt(var + eps) ulps of float32: too much for products of float32, and
    for 16 bits where eps lets that quotient grow.
    """
    return is_wide(q, k, v) or key_norm_eps < SMALL_EPS


def code_count(conv_ndim: int) -> int:
    """Different codes that a token can have: see ``tiles``."""
    return 4**conv_ndim + 1 if conv_ndim else 1


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless the kernels read them: their device, dtypes, widths, and that there are any."""
    check_device(q.device)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, tensor)
        if tensor.shape[3] > MAX_WIDTH:
            raise NodeArgumentError(
                f'{name}: expected at most {MAX_WIDTH} channels with impl="triton"; got '
                f'{tensor.shape[3]}; use impl="reference"'
            )
    if q.shape[0] == 0:
        raise NodeArgumentError(
            'q: expected at least one batch item with impl="triton"; got none; use impl="reference"'
        )


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise unless the kernels read that dtype."""
    if tensor.dtype not in DTYPES:
        raise NodeArgumentError(
            f'{name}: expected float32, float16 or bfloat16 with impl="triton"; got '
            f'{tensor.dtype}; use impl="reference"'
        )


def check_device(device: torch.device) -> None:
    """Raise unless the kernels run there."""
    if device.type not in ("cuda", "meta") and not INTERPRETED:
        raise NodeArgumentError(
            f'q: expected a GPU (device "cuda") with impl="triton"; got {device}; use '
            'impl="auto" or move model and inputs'
        )


def quad_count(grid: Sequence[int]) -> int:
    """Quads of tokens: 2 x 2 along the last two axes, 4 in a row of a grid of one."""
    if len(grid) == 1:
        return ceil_div(grid[-1], 4)
    return math.prod(grid[:-2]) * ceil_div(grid[-2], 2) * ceil_div(grid[-1], 2)


def reach(grid: Sequence[int]) -> int:
    """Tokens between which the first tokens of a tile's quads and their neighbours in a frame lie,
    at most, of tiles of up to 256 tokens.
    """
    return 1024 + (8 * grid[-1] if len(grid) > 1 else 0)


def near(tensor: Tensor, shape: Site) -> Tensor:
    """The tensor itself, or a copy where offsets within one tile could exceed 32 bits."""
    apart = reach(shape.axes) * tensor.stride(2) + tensor.shape[3] * tensor.stride(3)
    return tensor if apart < 2**31 else tensor.contiguous()


def check_reach(grid: Sequence[int], heads: int, width: int) -> None:
    """Raise if offsets within one tile of what the kernels write could exceed 32 bits."""
    most = 2**31 // (heads * width)
    if reach(grid) >= most:
        raise NodeArgumentError(
            f"grid: expected at most {(most - 1024) // 8} columns with {heads} heads of {width}; "
            f'got {grid[-1]}; use impl="reference"'
        )


def unit(*tensors: Tensor) -> int:
    """Elements of which all strides between tokens, heads and batch items are multiples: 8, 2 or 1.

    8 lets kernels load 16 bytes at once (of 16 bits), 2 two channels as one word. 1 where channels
    are not adjacent, or odd in number, or do not begin at a multiple of 16 bytes.
    """
    return strides(*tensors)[0]


def strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """Their `unit`, and of each those of batch items, heads and tokens in it, then of channels."""
    outer = [_outer_strides(t) for t in tensors]
    inner = [t.stride(3) for t in tensors]
    size = 1
    if all(
        step == 1 and t.shape[3] % 2 == 0 and _is_aligned(t)
        for t, step in zip(tensors, inner, strict=True)
    ):
        size = next(u for u in (8, 2, 1) if all(s % u == 0 for steps in outer for s in steps))
    own = [
        step
        for steps, last in zip(outer, inner, strict=True)
        for step in (*(s // size for s in steps), last)
    ]
    return size, own


def _is_aligned(tensor: Tensor) -> bool:
    """To 16 bytes. While a compiler traces there is no memory yet: Inductor copies inputs that are
    not aligned as those were that it traced with.
    """
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor.data_ptr() % 16 == 0
    return bool(tensor.storage_offset() * tensor.element_size() % 16 == 0)


def _outer_strides(tensor: Tensor) -> list[int]:
    """Strides that matter: an axis of one has none."""
    sizes, steps = tensor.shape, tensor.stride()
    return [steps[axis] if sizes[axis] != 1 else 0 for axis in range(3)]


def padded(channels: int) -> int:
    """The width of a tile: a power of two that the matrix units take."""
    return max(16, 1 << (int(channels) - 1).bit_length())


def precision() -> str:
    """How float32 is multiplied: exactly, unless the user lets cuBLAS use tf32 too."""
    allowed = torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "cpu" in Triton's interpreter."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; a few in Triton's interpreter, so that work is split there too."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function, and the kernels that it launches, on the device of its first argument."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(cast(Tensor, args[0])):
            return function(*args, **kwargs)

    return run


def launch(kernel: Any, programs: int, *args: Any, **settings: Any) -> None:
    """Runs a kernel on the current device, or has it traced."""
    if not INTERPRETED and is_traced(args[0]):
        kernel = torch.library.wrap_triton(kernel)
    kernel[(programs,)](*args, **settings)


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler or another mode of torch is to see what is done with a tensor. Where none
    is, the way of ``wrap_triton`` costs a millisecond a launch, or two microseconds in an operator.
    """
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return not plain or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def sum_blocks(shape: Site) -> int:
    """Programs that sum up the matrices of one owner."""
    return ceil_div(shape.matrices, SUM_BLOCK)


def sum_partials(
    partial: Tensor,
    out: Sequence[Tensor],
    shape: Site,
    *,
    owners: int,
    scale: float = 1.0,
    tokens: int = 1,
    base: Sequence[Tensor] = (),
    largest: Tensor | None = None,
) -> None:
    """out = base + scale / tokens * the sum of the rows of ``partial``, for each of three matrices.

    ``partial``: ``[splits, B*H, matrices]``; owners are the B*H groups or, for sums over the batch
    too, the H heads. ``base``: ``[H, ...]``, or ``[B, H, ...]`` to be summed over the batch.
    ``largest``: ``[owners, `sum_blocks`]``, to be given the largest magnitude in each block.
    """
    base_rows = 0 if not base else shape.batch if base[0].dim() == 4 else 1
    launch(
        sum_matrices,
        owners * sum_blocks(shape),
        *(partial, *(base or out), *out, partial if largest is None else largest),
        *(owners, shape.heads),
        *(partial.shape[0] * (shape.groups // owners), base_rows, scale, tokens),
        D=shape.dim,
        DV=shape.value_dim,
        LARGEST=largest is not None,
        BLOCK=SUM_BLOCK,
    )
