"""Versions of the packages that are installed."""

from __future__ import annotations

from importlib import metadata


def version_of(package: str) -> str | None:
    """The version of a distribution, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
