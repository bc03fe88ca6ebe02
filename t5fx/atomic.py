"""Files that are replaced whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: How the names of scratch files end; they begin with a dot and the name of the file beside them.
SCRATCH = ".t5fx-scratch"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file to write to, which takes the place of `path` when the block ends.

    Readers find all of the old file or all of the new one, also after a crash of the machine.
    Where the block raises an error, the old file stays.
    """
    with scratch_beside(path) as scratch:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)
    sync(path.parent)


@contextlib.contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """An empty file in the folder of `path`, with the permissions of any new one. It is removed at
    the end of the block, if it is still there then."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=SCRATCH)
    os.close(handle)
    scratch = Path(name)
    mask = os.umask(0)
    os.umask(mask)
    scratch.chmod(0o666 & ~mask)
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    with contextlib.suppress(OSError):  # a folder cannot be opened everywhere
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
