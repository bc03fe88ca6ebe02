"""Which node the options ask for."""

from __future__ import annotations

import dataclasses

from t5fx.config import LinearizeConfig
from t5fx.errors import ConfigError
from t5fx.kernels import NodeArgumentError
from t5fx.kernels.variant import NAMES, Variant


def variant_of(config: LinearizeConfig, *, axes: int) -> Variant:
    """The node of a site whose tokens lie on a grid of so many axes; 0 where that is unknown.

    There are as many coarse cells in all on one axis or three as on two.
    """
    variant = Variant(**{name: getattr(config, name) for name in NAMES})
    if not axes:
        return variant.without_grid()
    return dataclasses.replace(variant, coarse=round(config.coarse ** (2 / axes)))


def check_variants(config: LinearizeConfig) -> None:
    """Raise `ConfigError` for settings that contradict each other, of all sites or of some."""
    for pattern, changes in {"": {}, **config.overrides}.items():
        site = dataclasses.replace(config, overrides={}, **changes)
        try:
            variant = variant_of(site, axes=2)
        except NodeArgumentError as error:
            where = f"overrides[{pattern!r}]: " if pattern else ""
            raise ConfigError(f"{where}{error}") from error
        if not variant.is_anything:
            raise ConfigError(
                f"neighborhood, coarse: expected near attention with inner {site.inner!r}, which "
                f"is nothing else; got neighborhood {site.neighborhood}, coarse {site.coarse}"
            )
