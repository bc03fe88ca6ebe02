"""Which node the options ask for."""

from __future__ import annotations

from t5fx.config import LinearizeConfig
from t5fx.kernels.variant import NAMES, Variant


def variant_of(config: LinearizeConfig, *, grid: bool) -> Variant:
    """That of a site whose tokens lie on a grid, or of one where nobody knows how they lie."""
    variant = Variant(**{name: getattr(config, name) for name in NAMES})
    return variant if grid else variant.without_grid()
