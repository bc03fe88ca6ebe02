"""Compiles, on a machine without a GPU, the Triton kernels that a call would launch on one."""

import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from t5fx.kernels.triton_kernels import backward, forward

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Bytes that one program may have. NVIDIA: CUDA C++ programming guide, table of technical
#: specifications per compute capability; AMD: CDNA3's local data share.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def launches(architecture, dtype, dim, *, grid=(64, 64), heads=6, batch=2, locality="dwc_qk"):
    """Every launch of a forward and a backward on a packed projection: {name: (kernel, arguments)}.

    Nothing is launched: the tensors are on the device "meta".
    """
    found = {}

    def record(kernel, *args, grid, warmup, **settings):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | settings
        name = kernel.__name__
        if "WEIGHTS" in settings:
            name += "_weights" if settings["WEIGHTS"] else "_tokens"
        if "NORM" in settings:
            name += "_keys" if settings["NORM"] else "_queries"
        found.setdefault(name, (kernel, arguments))

    tokens = torch.Size(grid).numel() + 1
    packed = torch.empty(batch, tokens, 3, heads, dim, dtype=dtype, device="meta")
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    weights = [torch.empty(heads, dim, dim, device="meta") for _ in range(3)]
    conv = []
    if locality != "none":
        weight = torch.empty(heads * dim, 1, *(3,) * len(grid), device="meta")
        conv = [weight, torch.empty(heads * dim, device="meta")] * 2
    settings = {"scale": 0.1, "grid": grid, "prefix": 1, "key_norm_eps": 1.0, "locality": locality}
    architecture_of = "t5fx.kernels.triton_kernels.launch.architecture"
    with (
        # Tracing would know what to do on the device "meta": nothing.
        mock.patch("torch.library.wrap_triton", lambda kernel: kernel),
        mock.patch.object(triton.JITFunction, "run", record),
        mock.patch(architecture_of, return_value=architecture),
    ):
        out, saved = forward(q, k, v, weights, conv, **settings)
        backward(torch.empty_like(out), q, k, v, weights, conv, saved, **settings)
    return found


def compiled(kernel, arguments, architecture, *, floats="fp32"):
    """The compiled kernel, specialised as at run time: sizes of 1, and multiples of 16."""
    arguments = dict(arguments)
    options = {
        name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments
    }
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
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[architecture], options=options)


def spilled(kernel) -> int:
    """Bytes of local memory (the stack frame) that each thread of a compiled kernel has."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", kernel.asm["amdgcn"])[1])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return int(re.search(r"STACK:(\d+)", run.stdout)[1])
