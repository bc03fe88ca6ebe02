"""What identifies the code of t5fx where results of it are kept."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

#: The packages whose code decides what a model becomes; not the harness.
PACKAGES = (
    *("t5fx", "t5fx.patterns", "t5fx.kernels", "t5fx.kernels.inner"),
    "t5fx.kernels.triton_kernels",
    "t5fx.kernels.cpp",
)


@functools.cache
def code_digest() -> str:
    """Sixteen hexadecimal digits, other ones after any change of the code."""
    files: list[Path] = []
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        files += sorted(Path(spec.origin).parent.glob("*.[ch]*"))
        files += sorted(Path(spec.origin).parent.glob("*.py"))
    return digest_of(files)


def digest_of(files: Iterable[Path]) -> str:
    """Of the names and contents of files, in this order."""
    sha = hashlib.sha256()
    for path in files:
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:16]
