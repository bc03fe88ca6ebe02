"""What a user may ask of the backend."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5fx.analysis.variant import check_variants
from t5fx.backend import adapters as adapters
from t5fx.backend.adapters import Adapter
from t5fx.config import LinearizeConfig
from t5fx.errors import ConfigError

#: Fields of LinearizeConfig that mean nothing to a graph that Dynamo captured.
_NOT_HERE = ("dynamic",)


@dataclasses.dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="t5", options=...)` was given, checked.

    config: the fields of LinearizeConfig; adapter: trained parameters; mode and inductor:
    Inductor's mode and its own options.
    """

    config: LinearizeConfig
    adapter: Adapter | None
    mode: str | None
    inductor: dict[str, Any]

    @classmethod
    def of(cls, mode: str | None, options: dict[str, Any] | None) -> Options:
        """Raises `ConfigError` for an option that is unknown or outside its domain."""
        given = dict(options or {})
        names = [f.name for f in dataclasses.fields(LinearizeConfig) if f.name not in _NOT_HERE]
        own = ("adapter", "mode", "inductor")
        unknown = [repr(name) for name in given if name not in (*names, *own)]
        if unknown:
            raise ConfigError(
                f"options of backend='t5': expected any of {', '.join((*own, *names))}; got "
                f"{', '.join(unknown)}. Inductor's own options go into 'inductor'"
            )
        inductor = given.pop("inductor", None) or {}
        if not isinstance(inductor, dict):
            raise ConfigError(f"inductor: expected a dict of options, got {inductor!r}")
        mode = given.pop("mode", None) or mode
        origin = given.pop("adapter", None)
        adapter = None if origin is None else Adapter(origin)
        base = LinearizeConfig() if adapter is None else adapter.config or LinearizeConfig()
        config = dataclasses.replace(base, **given)
        check_variants(config)
        return cls(config, adapter, mode, inductor)
