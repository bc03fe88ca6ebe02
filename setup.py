"""The version for a build in an environment that has setuptools but not setuptools_scm.

`pip install --no-build-isolation .`, as `make gpu` runs it, takes the packages that it finds and
installs none; without setuptools_scm it would call every version 0.0.0.
"""

import importlib.util
import tomllib
from email.parser import BytesHeaderParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def version() -> str:
    """That of the source distribution, or the fallback of a checkout."""
    if (written := ROOT / "PKG-INFO").exists():
        return BytesHeaderParser().parsebytes(written.read_bytes())["Version"]
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    return tool["setuptools_scm"]["fallback_version"]


setup(**({} if importlib.util.find_spec("setuptools_scm") else {"version": version()}))
