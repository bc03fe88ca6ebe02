"""What is compared: each row is a configuration, with what the paper has for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import t5fx


@dataclass(frozen=True)
class Variant:
    """A row of a table.

    Attributes:
        group: the table; name: the row.
        options: fields of `LinearizeConfig`, where they differ from the published node's.
        freeze, full: DeiT-T's accuracy in the paper, %, by protocol (arXiv 2605.02772; softmax
            72.05); None where the paper has no such row.
        encoded: whether a convolution stands in front of each block; see `cpe`. Its parameters
            start at random, so only "full" makes sense of it.
    """

    group: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    freeze: float | None = None
    full: float | None = None
    encoded: bool = False

    def config(self, seed: int = 0) -> t5fx.LinearizeConfig:
        """With fresh parameters that depend on the seed."""
        # min_tokens=0: 50 tokens are too few to gain anything, and enough to show the quality.
        return t5fx.LinearizeConfig(**{**PUBLISHED, **self.options}, min_tokens=0, seed=seed)


#: The published node: near attention is a row of its own.
PUBLISHED: dict[str, Any] = {"neighborhood": 0, "coarse": 0}

INNER, NORM, LOCAL, PEERS = "inner model", "key norm", "locality", "peers"

_PLAIN = {"locality": "none"}
_LINEAR = {"locality": "none", "key_norm": "none"}


def _half(side: int, **more: Any) -> dict[str, Any]:
    """Half of each, near attention in a window and the node, as the paper mixes them."""
    return {"neighborhood": side, "mix": "half", **more}


#: Every row; those of one name in two tables are measured once.
VARIANTS = (
    Variant(INNER, "linear", {"inner": "linear", **_LINEAR}, 3.71, 63.30),
    Variant(INNER, "linear, projected", {"inner": "linear_projqk", **_LINEAR}, 24.39, 66.23),
    Variant(INNER, "one layer, gated", {"inner": "gate1", **_PLAIN}, 61.95, 67.59),
    Variant(INNER, "two layers", {"inner": "mlp2", **_PLAIN}, 65.98, 68.14),
    Variant(INNER, "three layers", {"inner": "mlp3", **_PLAIN}, 67.09, 68.93),
    Variant(INNER, "SwiGLU", _PLAIN, 67.33, 69.25),
    Variant(LOCAL, "SwiGLU", _PLAIN, 67.33, 69.25),
    Variant(LOCAL, "convolved input of blocks (CPE)", _PLAIN, None, 69.64, encoded=True),
    Variant(LOCAL, "convolved values", {"locality": "dwc_v"}, None, 70.47),
    Variant(LOCAL, "convolved queries and keys", {}, None, 71.19),
    Variant(LOCAL, "and half a window of 3", _half(3), None, 71.67),
    Variant(LOCAL, "and half a window of 5", _half(5), None, 72.06),
    Variant(LOCAL, "and t5fx's near attention", {"neighborhood": 5, "coarse": 8}),
    Variant(NORM, "no norm", {"key_norm": "none"}, None, 0.37),
    Variant(NORM, "RMS", {"key_norm": "rms"}, None, 57.38),
    Variant(NORM, "layer", {"key_norm": "layer"}, None, 57.25),
    Variant(NORM, "instance, mean kept", {"key_norm": "instance_scale"}, None, 51.43),
    Variant(NORM, "instance, not divided", {"key_norm": "instance_center"}, None, 71.15),
    Variant(NORM, "convolved queries and keys", {}, None, 71.19),
    Variant(PEERS, "Performer", {"inner": "performer", **_LINEAR}),
    Variant(PEERS, "Hedgehog", {"inner": "hedgehog", **_LINEAR}),
    Variant(PEERS, "LiT", {"inner": "lit", "key_norm": "none", "locality": "dwc_v"}),
    Variant(PEERS, "sliding window of 5 (CLEAR)", {"inner": "none", "neighborhood": 5, **_LINEAR}),
    Variant(
        PEERS,
        "DiT5's node",
        _half(5, inner="mlp2", inner_loss="l2", qk_affine=True),
    ),
)

#: The four that tests run, and `--small`.
SMALL = ("linear", "two layers", "SwiGLU", "convolved queries and keys")


def is_trainable(linear: nn.Module) -> bool:
    """Whether a converted model has new parameters."""
    return next(t5fx.adapter(linear).parameters(), None) is not None


def variants(names: tuple[str, ...] = ()) -> list[Variant]:
    """Each row once, of those names or all."""
    found = {one.name: one for one in reversed(VARIANTS) if not names or one.name in names}
    return [one for one in VARIANTS if found.get(one.name) is one]
