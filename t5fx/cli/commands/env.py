"""Print what a bug report needs: versions, devices, the compiler, caches and their sizes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from t5fx import cache
from t5fx.analysis.clock import device_name
from t5fx.cli.arguments import add_output
from t5fx.cli.running import Result
from t5fx.versions import version_of

PACKAGES = (
    *("t5fx", "torch", "triton", "timm", "transformers", "diffusers", "accelerate", "peft"),
    *("safetensors", "torchvision", "numpy"),
)
#: Variables of the environment that change what t5fx and torch.compile do.
VARIABLES = re.compile(
    r"(T5FX_|TORCH|TRITON_|CUDA_|HF_HOME|HF_HUB_)\w+$|(OMP|MKL)_NUM_THREADS$|CXX$|XDG_CACHE_HOME$"
)
#: Of these the values that are nobody's business, such as HF_HUB_TOKEN.
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
#: What Linux calls the vector extensions that a kernel may use.
EXTENSIONS = re.compile(r"sse4_[12]|avx|fma$|f16c|amx|asimd|sve|i8mm|bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output(parser)


def run(options: argparse.Namespace) -> Result:
    data = {
        "packages": {name: version_of(name) for name in PACKAGES},
        "python": f"{platform.python_implementation()} {platform.python_version()}, "
        f"{sys.executable}",
        "os": platform.platform(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "compiler": _compiler(),
        "caches": _caches(),
        "verdicts": list(_verdicts()),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if VARIABLES.match(name) and not SECRET.search(name)
        },
    }
    return Result(data, (_text(data),))


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": device_name(torch.device("cpu")),
        "cores": usable,
        "threads": torch.get_num_threads(),
        # What torch, and with it Inductor's C++, makes of them.
        "capability": torch.backends.cpu.get_cpu_capability(),
        "extensions": [f for f in (flags[1].split() if flags else ()) if EXTENSIONS.match(f)],
    }


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": about.name,
                "memory": about.total_memory,
                "capability": f"{about.major}.{about.minor}",
                "runtime": f"ROCm {torch.version.hip}"
                if torch.version.hip
                else f"CUDA {torch.version.cuda}",
            }
        )
    return found


def _compiler() -> dict[str, str | None]:
    """The C++ compiler that Inductor takes, by its own rule."""
    from torch._inductor import cpp_builder

    try:
        command = shlex.split(cpp_builder.get_cpp_compiler())
        said = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=True, timeout=30
        )
    except Exception as error:  # of many kinds, where there is none
        return {"path": None, "version": " ".join(str(error).split())}
    return {
        "path": shutil.which(command[0]) or command[0],
        "version": said.stdout.partition("\n")[0],
    }


def _caches() -> dict[str, dict[str, Any]]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    triton = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    folders = {"t5fx": cache.folder(), "inductor": Path(cache_dir()), "triton": Path(triton)}
    return {name: {"path": str(path), "bytes": _size(path)} for name, path in folders.items()}


def _size(folder: Path) -> int | None:
    """Bytes of all files under a folder, or None where there is none."""
    if not folder.is_dir():
        return None
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(where) / name).lstat().st_size
            except OSError:  # removed meanwhile
                continue
    return total


def _verdicts() -> Iterator[dict[str, Any]]:
    """What `t5fx.kernels.trust` found out about the Triton kernels, a file each."""
    for path in sorted(cache.folder().glob("trust-*.json")):
        try:
            fact = json.loads(path.read_text(encoding="utf-8"))
            yield {"file": str(path), **{n: fact.get(n) for n in ("status", "reason", "key")}}
        except (OSError, ValueError, AttributeError) as error:
            yield {"file": str(path), "status": "unreadable", "reason": str(error), "key": None}


def _text(data: Mapping[str, Any]) -> str:
    cpu, compiler = data["cpu"], data["compiler"]
    lines = [(name, version or "not installed") for name, version in data["packages"].items()]
    lines += [("python", data["python"]), ("os", data["os"])]
    lines += [("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} used")]
    lines += [("vectors", f"{cpu['capability']}: {' '.join(cpu['extensions']) or 'unknown'}")]
    for gpu in data["gpus"]:
        memory = f"{gpu['memory'] / 2**30:.0f} GiB"
        about = (gpu["name"], memory, f"capability {gpu['capability']}", gpu["runtime"])
        lines.append(("gpu", ", ".join(about)))
    if not data["gpus"]:
        lines.append(("gpu", "none that torch sees"))
    lines.append(("compiler", f"{compiler['path'] or 'none'}: {compiler['version']}"))
    for name, about in data["caches"].items():
        size = "not there" if about["bytes"] is None else f"{about['bytes'] / 2**20:.1f} MiB"
        lines.append((f"cache of {name}", f"{about['path']}, {size}"))
    for verdict in data["verdicts"]:
        text = f"{verdict['status']}: {verdict['file']}: {verdict['reason']}"
        lines.append(("triton kernels", text))
    if not data["verdicts"]:
        lines.append(("triton kernels", "not checked here yet"))
    lines += list(data["variables"].items())
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)
