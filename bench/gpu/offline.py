"""Compiles, on a machine without a GPU, the Triton kernels that a call would launch on one, and
counts what their machine code does.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from t5fx.kernels.triton_kernels import backward, forward, launch
from t5fx.kernels.triton_kernels.near_launch import near_backward, near_forward

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Bytes that one program may have. NVIDIA: CUDA C++ programming guide, table of technical
#: specifications per compute capability; AMD: CDNA3's local data share.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
#: What the programs on a multiprocessor share: bytes of shared memory, of which each takes 1 KiB
#: more than it asks for, warps, and programs. All have 64 Ki registers, which a warp gets 256 at a
#: time. From the same table.
MULTIPROCESSOR = {
    "sm_80": (164 * 1024, 64, 32),
    "sm_89": (100 * 1024, 48, 24),
    "sm_90": (228 * 1024, 64, 32),
    "sm_100": (228 * 1024, 64, 32),
}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


#: A kernel and the arguments of its launch, by name.
Launch = tuple[Any, dict[str, Any]]


def launches(
    architecture: str,
    dtype: torch.dtype,
    dim: int,
    *,
    grid: tuple[int, ...] = (64, 64),
    heads: int = 6,
    batch: int = 2,
    locality: str = "dwc_qk",
    value_dim: int | None = None,
) -> dict[str, Launch]:
    """The launches of a forward and a backward by name: (kernel, arguments), of several with one
    name the first; those that write or read kept keys have names of their own. The arguments are
    those of `each_launch`.
    """
    found: dict[str, Launch] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | settings
        name = kernel.__name__
        if "KEYS" in settings:
            name += "_keys" if settings["KEYS"] else "_queries"
        if settings.get("KEEP") or settings.get("KEPT"):
            name += "_kept"
        found.setdefault(name, (kernel, arguments))

    each_launch(
        record,
        architecture,
        dtype,
        dim,
        grid=grid,
        heads=heads,
        batch=batch,
        locality=locality,
        value_dim=value_dim,
    )
    return found


def each_launch(
    run: Callable[..., Any],
    architecture: str,
    dtype: torch.dtype,
    dim: int,
    *,
    grid: tuple[int, ...] = (64, 64),
    heads: int = 6,
    batch: int = 2,
    locality: str = "dwc_qk",
    value_dim: int | None = None,
) -> None:
    """Calls ``run`` as Triton's ``JITFunction.run``, for each launch of a forward alone, and of a
    forward and its backward.

    q, k and v are parts of a packed projection; v is a tensor of its own with another ``value_dim``
    than ``dim``. Nothing is launched: the tensors are on the device "meta".
    """
    tokens = torch.Size(grid).numel() + 1
    packed = torch.empty(batch, tokens, 3, heads, dim, dtype=dtype, device="meta")
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    if value_dim not in (None, dim):
        v = torch.empty(batch, heads, tokens, value_dim, dtype=dtype, device="meta")
    weights = [torch.empty(heads, dim, width, device="meta") for width in (dim, dim, v.shape[3])]
    conv = []
    if locality != "none":
        weight = torch.empty(heads * dim, 1, *(3,) * len(grid), device="meta")
        conv = [weight, torch.empty(heads * dim, device="meta")] * 2
    settings = {"scale": 0.1, "grid": grid, "prefix": 1, "key_norm_eps": 1.0, "locality": locality}
    with _launched_by(run, architecture):
        forward(q, k, v, weights, conv, **settings)
        out, saved = forward(q, k, v, weights, conv, **settings, training=True)
        backward(torch.empty_like(out), q, k, v, weights, conv, saved, **settings)


def near_launches(
    architecture: str,
    dtype: torch.dtype,
    dim: int,
    *,
    grid: tuple[int, ...] = (64, 64),
    prefix: int = 1,
    heads: int = 6,
    batch: int = 2,
    neighborhood: int = 5,
    coarse: int = 8,
    gated: bool = True,
) -> dict[str, Launch]:
    """The same of near attention's forward and backward; what would run it is not asked for."""
    found: dict[str, Launch] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        found[kernel.__name__] = kernel, dict(zip(kernel.arg_names, args, strict=False)) | settings

    tokens = torch.Size(grid).numel() + prefix
    packed = torch.empty(batch, tokens, 3, heads, dim, dtype=dtype, device="meta")
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    base = torch.empty(batch, tokens, heads, dim, dtype=dtype, device="meta").transpose(1, 2)
    mixing = [torch.empty(heads, device="meta")] if gated else []
    settings = {"scale": 0.1, "grid": grid, "prefix": prefix}
    settings |= {"neighborhood": neighborhood, "coarse": coarse}
    with _launched_by(record, architecture):
        out, saved = near_forward(q, k, v, base, mixing, **settings)
        near_backward(torch.empty_like(out), q, k, v, mixing, saved, **settings)
    return found


@contextmanager
def _launched_by(run: Callable[..., Any], architecture: str) -> Iterator[None]:
    """``run`` stands for Triton's own, on an architecture."""
    with (
        # Tracing would know what to do on the device "meta": nothing.
        mock.patch("torch.library.wrap_triton", lambda kernel: kernel),
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(launch, "architecture", return_value=architecture),
    ):
        yield


def compiled(
    kernel: Any,
    arguments: dict[str, Any],
    architecture: str,
    *,
    floats: str = "fp32",
    sizes: str = "i32",
) -> Any:
    """The compiled kernel, specialised as at run time: sizes of 1, and multiples of 16."""
    arguments = dict(arguments)
    options = {
        name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments
    }
    options["enable_fp_fusion"] = True  # a default that changes with Triton's version
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (
            isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        ):
            signature[parameter.name] = "constexpr"
            constants[i,] = value
        elif isinstance(value, float):
            signature[parameter.name] = floats
        else:
            small = sizes if parameter.do_not_specialize else "i32"
            signature[parameter.name] = small if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[architecture], options=options)


def spilled(kernel: Any) -> int:
    """Bytes of local memory (the stack frame) that each thread of a compiled kernel has."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", kernel.asm["amdgcn"])[1])
    return int(re.search(r"STACK:(\d+)", _dumped(kernel, "-res-usage"))[1])


def resident(kernel: Any, architecture: str) -> int:
    """Programs of a compiled kernel that an NVIDIA multiprocessor has room for."""
    memory, warps, programs = MULTIPROCESSOR[architecture]
    registers = int(re.search(r"REG:(\d+)", _dumped(kernel, "-res-usage"))[1])
    of_warp = -(-32 * registers // 256) * 256
    own = kernel.metadata.num_warps
    of_memory = memory // (kernel.metadata.shared + 1024)
    return min(64 * 1024 // of_warp // own, of_memory, warps // own, programs)


def _dumped(kernel: Any, what: str) -> str:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = subprocess.run(
            [cuobjdump, what, file.name], capture_output=True, text=True, check=True
        )
    return run.stdout


class Instruction(NamedTuple):
    address: int
    name: str  # "HGMMA.64x64x16.F32.BF16", ...
    operands: str
    predicated: bool = False

    @property
    def target(self) -> int | None:
        """Where a branch leads."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found else None


def instructions(kernel: Any) -> list[Instruction]:
    """The machine code of a kernel for an NVIDIA GPU."""
    line = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Za-z0-9_.]+)\s*(.*?);")
    found = map(line.match, _dumped(kernel, "-sass").splitlines())
    return [Instruction(int(m[1], 16), m[3], m[4], bool(m[2])) for m in found if m]


def serialised(code: list[Instruction]) -> bool:
    """Whether each matrix instruction (of a warpgroup) waits for the one before it."""
    names = collections.Counter(i.name.partition(".")[0] for i in code)
    waits = sum(i.name == "WARPGROUP.ARRIVE" for i in code)
    return 0 < names["HGMMA"] <= waits


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops, shortest first: what lies between a branch back and its target."""
    bodies = [
        [i for i in code if last.target <= i.address <= last.address]
        for last in code
        if last.target is not None and last.target < last.address
    ]
    return sorted(bodies, key=len)


def token_loop(code: list[Instruction], columns: int = 4) -> collections.Counter[str]:
    """Instructions of a thread in one tile of tokens on the grid, by name without its suffixes.

    The tile's loop is the shortest that multiplies matrices or, without products, the longest of
    all. Of its branches the longest path counts: tiles off the grid have less to do. A loop in it
    is the one over the columns around quads; each of its branches is passed by in one of them.
    """
    bodies = loops(code)
    matrix = [
        body for body in bodies if any("MMA" in i.name and "HFMA" not in i.name for i in body)
    ]
    tile = matrix[0] if matrix else bodies[-1]
    turns = dict.fromkeys((i.address for i in tile), 1)
    for body in bodies:
        if body is not tile and body[0].address in turns and body[-1].address in turns:
            skipped = [(i.address, i.target) for i in body if i.predicated and i.target in turns]
            for i in body:
                passed_by = any(branch < i.address < target for branch, target in skipped)
                turns[i.address] = columns - 1 if passed_by else columns
    counts = collections.Counter[str]()
    for i in _longest_path(tile):
        counts[i.name.partition(".")[0]] += turns[i.address]
    return counts


def _longest_path(body: list[Instruction]) -> list[Instruction]:
    """Through one turn of a loop, without branches back."""
    at = {i.address: place for place, i in enumerate(body)}
    end = len(body)
    length, following = [0] * (end + 1), [end] * end
    for place in reversed(range(end)):
        instruction = body[place]
        target = instruction.target
        ahead = [place + 1] if instruction.predicated or target is None else [end]
        if target in at and at[target] > place:
            ahead = ahead[: instruction.predicated] + [at[target]]
        following[place] = max(ahead, key=length.__getitem__)
        length[place] = 1 + length[following[place]]
    path, place = [], 0
    while place < end:
        path.append(body[place])
        place = following[place]
    return path
