"""`LinearizeConfig`: every option of the pass, as one frozen, serialisable value."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from t5fx.errors import ConfigError

VERSION = 1

Inner = Literal[
    "swiglu",
    "mlp2",
    "mlp3",
    "gate1",
    "linear",
    "linear_projqk",
    "hedgehog",
    "lit",
    "performer",
    "none",
]
InnerLoss = Literal["dot", "l2"]
KeyNorm = Literal["instance", "instance_center", "instance_scale", "rms", "layer", "none"]
Locality = Literal["dwc_qk", "dwc_v", "none"]
Mix = Literal["gate", "half"]
Policy = Literal["flops", "measure"]
Impl = Literal["auto", "reference", "triton"]

#: Domain of every field whose values are names; the first one is the default.
CHOICES: dict[str, tuple[str, ...]] = {
    "inner": get_args(Inner),
    "inner_loss": get_args(InnerLoss),
    "key_norm": get_args(KeyNorm),
    "locality": get_args(Locality),
    "mix": get_args(Mix),
    "policy": get_args(Policy),
    "impl": get_args(Impl),
}

#: Fields that decide which sites are taken at all; an override per site may not set them.
_GLOBAL_ONLY = ("include", "exclude", "overrides", "seed", "policy", "dynamic")

Layout = int | Callable[..., int] | None
Grid = tuple[int, ...] | Callable[..., tuple[int, ...]] | None


@dataclass(frozen=True)
class LinearizeConfig:
    """All options of `t5fx.linearize` and `t5fx.explain`.

    Attributes:
        inner: inner model of the TTT node: "swiglu", "mlp2", "mlp3" or "gate1". There are also
            linear attentions to compare with, which are not trained on each input: "linear" (phi =
            elu + 1), "linear_projqk" (the same on projected q and k), "hedgehog", "lit" and
            "performer" (`t5fx.kernels.inner`). With "none" the node is near attention alone.
        inner_loss: loss of the inner step: "dot", -(s/N) sum v.f(k), or "l2",
            (s/2N) sum |f(k) - v|^2.
        key_norm: normalisation of the keys before the inner step.
        key_norm_eps: number that is added to the variance in this normalisation.
        locality: where the depthwise convolutions are: on q and k, on v, or nowhere. With "none" a
            site is rewritten even if the layout of its tokens is unknown; it then has no near
            attention.
        neighborhood: side of the window of near tokens to which softmax attention is kept, an odd
            number from 3 on, or 0 for no window. At the borders of the grid the window is moved
            inwards, as in the natten package.
        coarse: number of cells along each axis of a grid of two axes (a grid of one axis or three
            has as many cells in all). Queries also attend to the mean key and value of each cell.
            0 is no cells.
        mix: how this near attention a is added to the node's output o: "gate", o + gate * a with a
            learned gate for each head, or "half", (o + a) / 2. Prefix and suffix tokens see every
            key.
        qk_affine: whether there is a learned scale and offset for each channel of q and k, before
            key norm and convolutions. DiT5 as published has it, with inner "mlp2", inner_loss "l2",
            neighborhood 5, coarse 0 and mix "half".
        grid: the sizes of the one to three axes on which the tokens lie in row-major order. None
            infers them from the graph; otherwise a tuple, or a function of the call's arguments
            that returns a tuple and is evaluated at each call. A grid is refused if positions or
            sides among the arguments, or the graph itself, contradict it.
        prefix: the number of tokens before the grid, as for `grid`.
        suffix: the number of tokens after the grid, as for `grid`.
        min_tokens: smallest number of tokens of a site that is rewritten. None uses the cost model,
            which rewrites a site if the node needs fewer FLOPs than softmax (a "swiglu" with K keys
            of near attention does for N > 4.5 D + K), weighted by the estimated speed of the
            implementation that will run.
        include: `fnmatch` patterns of the names of owners that may be rewritten, such as
            ("blocks.[0-5].*",).
        exclude: patterns of the names of owners that may not be rewritten; `exclude` overrides
            `include`.
        overrides: {owner pattern: {field: value}}: other options for the sites whose owner matches;
            if several patterns match, later ones override earlier ones.
        policy: how the cost of a site is judged, at the example's sizes. "flops" counts operations.
            "measure" compiles softmax and the node and times both on the device, with the backward
            pass if the model is in training mode, and rewrites a site if the node is faster. That
            takes seconds for each new shape; the times are kept in the folder $T5FX_CACHE_DIR. If
            impl "auto" may choose the Triton kernels, the kernels and the reference are timed and
            compared, and the faster one is used. Either policy only sees sites that `min_tokens`
            admits.
        impl: implementation of the node: "auto", "reference" (ordinary operators) or "triton"
            (kernels for GPUs, without a check; only for the default inner model, loss and key norm
            and locality "dwc_qk" or "none"); see `t5fx.kernels.ttt`. "auto" chooses by device. It
            is C++ on a CPU. On a GPU in 16 bits it is the Triton kernels if a check of them on that
            GPU passes, which takes about a minute for each kind of site and is remembered in
            $T5FX_CACHE_DIR (T5FX_TRITON=0 turns check and kernels off). Otherwise it is ordinary
            operators. `Site.impl` and `Site.impl_reason` say which one it is and why.
        seed: the initial values of new parameters depend on this number and the site's name alone.
        dynamic: whether the model is judged for all sizes of its arguments (True), for those of the
            example (False; each further size is judged at its first call), or for all sizes if the
            model can be traced with dynamic sizes (None). The report says which of them applied.

    Raises:
        ConfigError: a value outside its domain.
    """

    inner: Inner = "swiglu"
    inner_loss: InnerLoss = "dot"
    key_norm: KeyNorm = "instance"
    key_norm_eps: float = 1.0
    locality: Locality = "dwc_qk"
    neighborhood: int = 5
    coarse: int = 8
    mix: Mix = "gate"
    qk_affine: bool = False
    grid: Grid = None
    prefix: Layout = None
    suffix: Layout = None
    min_tokens: int | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    policy: Policy = "flops"
    impl: Impl = "auto"
    seed: int = 0
    dynamic: bool | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}: expected one of {', '.join(map(repr, allowed))}, "
                    f"got {getattr(self, name)!r}"
                )
        for name in ("include", "exclude"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if isinstance(self.grid, int):
            object.__setattr__(self, "grid", (self.grid,))
        if self.grid is not None and not callable(self.grid):
            grid = tuple(self.grid)
            object.__setattr__(self, "grid", grid)
            if not 1 <= len(grid) <= 3 or not all(_natural(n) and n > 0 for n in grid):
                raise ConfigError(f"grid: expected one to three positive integers, got {grid!r}")
        for name in ("prefix", "suffix", "min_tokens"):
            value = getattr(self, name)
            wanted = value is None or _natural(value) or (name != "min_tokens" and callable(value))
            if not wanted:
                raise ConfigError(f"{name}: expected a number of tokens >= 0, got {value!r}")
        eps = self.key_norm_eps
        if not isinstance(eps, int | float) or not math.isfinite(eps) or eps < 0:
            raise ConfigError(f"key_norm_eps: expected a finite number >= 0, got {eps!r}")
        side = self.neighborhood
        if not _natural(side) or (side and (side < 3 or side % 2 == 0)):
            raise ConfigError(f"neighborhood: expected 0 or an odd number from 3 on, got {side!r}")
        if not _natural(self.coarse):
            raise ConfigError(
                f"coarse: expected a number of cells along an axis, or 0, got {self.coarse!r}"
            )
        if not isinstance(self.qk_affine, bool):
            raise ConfigError(f"qk_affine: expected True or False, got {self.qk_affine!r}")
        if self.dynamic not in (None, True, False):
            raise ConfigError(f"dynamic: expected True, False or None, got {self.dynamic!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed: expected an integer, got {self.seed!r}")
        names = [f.name for f in dataclasses.fields(self) if f.name not in _GLOBAL_ONLY]
        for pattern, changes in self.overrides.items():
            unknown = sorted(set(changes) - set(names))
            if unknown:
                raise ConfigError(
                    f"overrides[{pattern!r}]: {', '.join(unknown)} cannot be set per site; "
                    f"expected any of {', '.join(names)}"
                )
            dataclasses.replace(self, overrides={}, **changes)  # checks the values

    def selects(self, owner: str) -> bool:
        """Whether the site owned by module `owner` is included and not excluded."""

        def any_of(patterns: tuple[str, ...]) -> bool:
            return any(fnmatchcase(owner, p) for p in patterns)

        return any_of(self.include) and not any_of(self.exclude)

    def at(self, owner: str) -> LinearizeConfig:
        """The configuration of the site owned by module `owner`, overrides applied."""
        changes: dict[str, Any] = {}
        for pattern, fields in self.overrides.items():
            if fnmatchcase(owner, pattern):
                changes.update(fields)
        return dataclasses.replace(self, overrides={}, **changes) if changes else self

    @property
    def gives_layout(self) -> bool:
        """Whether the layout of any site is given instead of inferred."""
        given = (self.grid, self.prefix, self.suffix)
        names = {name for changes in self.overrides.values() for name in changes}
        return any(v is not None for v in given) or bool(names & {"grid", "prefix", "suffix"})

    @property
    def has_callables(self) -> bool:
        """Whether the layout of any site is a callable of the call's arguments."""
        fields = ({"grid": self.grid, "prefix": self.prefix, "suffix": self.suffix},)
        return any(callable(v) for f in (*fields, *self.overrides.values()) for v in f.values())

    @property
    def layout_key(self) -> tuple[Any, ...]:
        """What tells two configurations apart that differ in the values of layouts only."""
        overrides = tuple(
            (pattern, tuple(sorted((k, str(v)) for k, v in fields.items())))
            for pattern, fields in self.overrides.items()
        )
        return (self.grid, self.prefix, self.suffix, overrides)

    def called(self, call: Callable[[Callable[..., Any]], Any]) -> LinearizeConfig:
        """This configuration with `call(layout)` in place of each layout that is a callable."""

        def values(fields: Mapping[str, Any]) -> dict[str, Any]:
            return {n: call(v) if callable(v) else v for n, v in fields.items()}

        own = {"grid": self.grid, "prefix": self.prefix, "suffix": self.suffix}
        overrides = {pattern: values(changes) for pattern, changes in self.overrides.items()}
        return dataclasses.replace(self, **values(own), overrides=overrides)

    def to_dict(self, callables: str | None = None) -> dict[str, Any]:
        """Plain data with the version, ready for JSON.

        callables: what to write for a grid, prefix or suffix that is a callable; without it such
        a one raises `ConfigError`.
        """
        data = dataclasses.asdict(self)
        for where in (data, *data["overrides"].values()):
            for name, value in where.items():
                if callable(value):
                    if callables is None:
                        raise ConfigError(f"{name}: a callable has no JSON form; give a value")
                    where[name] = callables
        return {"version": VERSION, **data}

    def to_json(self) -> str:
        """Versioned JSON. Raises `ConfigError` where grid, prefix or suffix is a callable."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Any) -> LinearizeConfig:
        """Inverse of `to_dict`. Raises `ConfigError` for another version or unknown fields."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise ConfigError(
                f"expected a LinearizeConfig of version {VERSION}, got {str(data)[:60]!r}"
            )
        fields = {name: value for name, value in data.items() if name != "version"}
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"unknown fields of LinearizeConfig: {', '.join(unknown)}")
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> LinearizeConfig:
        """Inverse of `to_json`. Raises `ConfigError` for another version or unknown fields."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"expected the JSON of a LinearizeConfig: {error}") from error


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
