"""The pattern library: one small file a family of attention spellings, found by discovery."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache

from t5fx.patterns.base import Pattern


@lru_cache(maxsize=1)
def patterns() -> tuple[Pattern, ...]:
    """Every pattern defined in the files of this folder, in the order of their names."""
    for info in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{info.name}")
    return tuple(cls() for cls in sorted(Pattern.__subclasses__(), key=lambda c: c.name))
