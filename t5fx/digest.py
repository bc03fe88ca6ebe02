"""What identifies the code of t5fx where results of it are kept."""

from __future__ import annotations

import functools
import hashlib
import pkgutil
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

#: Where the walk begins: folders that are one inside another only once they are installed.
_ROOTS = (
    *("t5fx", "t5fx.patterns", "t5fx.kernels", "t5fx.kernels.cpp", "t5fx.kernels.inner"),
    "t5fx.kernels.triton_kernels",
)

#: The packages of t5fx whose code decides nothing of what a model becomes.
_OTHERS = ("t5fx.bench", "t5fx.cli")


@functools.cache
def code_digest() -> str:
    """Sixteen hexadecimal digits, other ones after any change of the code, which is looked for in
    every package of t5fx.
    """
    return digest_of(path for folder in folders() for path in _sources(folder))


def folders() -> list[Path]:
    """The folders of all the packages whose code counts."""
    return sorted({folder.resolve() for root in _ROOTS for folder in _folders(root)})


def _folders(package: str) -> Iterator[Path]:
    """The folders of a package and of those in it."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    yield Path(spec.origin).parent
    found = pkgutil.iter_modules(spec.submodule_search_locations, f"{package}.")
    for module in sorted(module.name for module in found if module.ispkg):
        if module not in _OTHERS:
            yield from _folders(module)


def _sources(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("*.[ch]*")), *sorted(folder.glob("*.py"))]


def digest_of(files: Iterable[Path]) -> str:
    """Of the names and contents of files, in this order."""
    sha = hashlib.sha256()
    for path in files:
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:16]
