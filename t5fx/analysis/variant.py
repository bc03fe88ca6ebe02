"""Which node the options ask for."""

from __future__ import annotations

import dataclasses

from t5fx.config import LinearizeConfig
from t5fx.kernels.variant import NAMES, Variant


def variant_of(config: LinearizeConfig, *, axes: int) -> Variant:
    """That of a site whose tokens lie on a grid of so many axes; 0, nobody knows how they lie.

    There are as many coarse cells in all on one axis or three as on two.
    """
    variant = Variant(**{name: getattr(config, name) for name in NAMES})
    if not axes:
        return variant.without_grid()
    return dataclasses.replace(variant, coarse=round(config.coarse ** (2 / axes)))
