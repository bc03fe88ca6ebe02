"""Which node it is: the settings of a TTT node that are names and numbers of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import NodeArgumentError, require_name
from .inner import INNER_MODELS
from .key_norm import KEY_NORMS
from .locality import CONVOLVED

#: Inner losses: "dot" is -(s/N) sum_t v_t . f(k_t), "l2" is (s/2N) sum_t |f(k_t) - v_t|^2.
INNER_LOSSES = ("dot", "l2")
#: How near attention is mixed in: added, times a learned gate a head, or half of each.
MIXES = ("gate", "half")
#: The parameters of "qk_affine", [H*D] each, channel h*D + d.
AFFINE = ("q_scale", "q_offset", "k_scale", "k_offset")


@dataclass(frozen=True)
class Variant:
    """The settings of a node but for its sizes, scale and implementation; see ``t5fx.kernels.ttt``.

    Raises:
        NodeArgumentError: a name that is not known, a window that is not odd, a setting that the
            inner model does not read.
    """

    inner: str = "swiglu"
    inner_loss: str = "dot"
    key_norm: str = "instance"
    key_norm_eps: float = 1.0
    locality: str = "dwc_qk"
    neighborhood: int = 0
    coarse: int = 0
    mix: str = "gate"
    qk_affine: bool = False

    def __post_init__(self) -> None:
        require_name("inner", self.inner, INNER_MODELS)
        require_name("inner_loss", self.inner_loss, INNER_LOSSES)
        require_name("key_norm", self.key_norm, KEY_NORMS)
        require_name("locality", self.locality, CONVOLVED)
        require_name("mix", self.mix, MIXES)
        side = self.neighborhood
        if side < 0 or (side and (side < 3 or side % 2 == 0)):
            raise NodeArgumentError(
                f"neighborhood: expected 0 or an odd number from 3 on; got {side}"
            )
        if self.coarse < 0:
            raise NodeArgumentError(
                f"coarse: expected a number of cells along an axis, or 0; got {self.coarse}"
            )
        mixer = INNER_MODELS[self.inner]
        if self.inner_loss != "dot" and not mixer.has_loss:
            raise NodeArgumentError(
                f'inner_loss: expected "dot", the default, with inner {self.inner!r}, which is not '
                f"trained and reads none; got {self.inner_loss!r}"
            )
        read = {"key_norm": "none", "locality": "none", "mix": "gate"}
        unread = [f"{n}={getattr(self, n)!r}" for n, v in read.items() if getattr(self, n) != v]
        if unread and not mixer.reads_tokens:
            raise NodeArgumentError(
                f"inner {self.inner!r}, near attention alone: expected key_norm='none', "
                f"locality='none' and mix='gate'; got {', '.join(unread)}"
            )

    @property
    def is_near(self) -> bool:
        """Whether softmax attention to near tokens, coarse cells and the prefix is mixed in."""
        return bool(self.neighborhood or self.coarse)

    @property
    def is_gated(self) -> bool:
        """Whether a gate is among the parameters."""
        return self.is_near and self.mix == "gate"

    @property
    def needs_grid(self) -> bool:
        """Whether the tokens' places on a grid are read."""
        return self.is_near or bool(CONVOLVED[self.locality])

    @property
    def is_anything(self) -> bool:
        """Whether tokens are mixed at all."""
        return self.is_near or INNER_MODELS[self.inner].reads_tokens

    @property
    def does_without_grid(self) -> bool:
        """Whether `without_grid` is still the node that was asked for, but for near attention."""
        return self.locality == "none" and INNER_MODELS[self.inner].reads_tokens

    @property
    def is_written_out(self) -> bool:
        """Whether its forward and backward exist written out, beside the reference."""
        ttt = self.inner, self.inner_loss, self.key_norm
        return ttt == ("swiglu", "dot", "instance") and self.locality in ("dwc_qk", "none")

    def without_grid(self) -> Variant:
        """This node for tokens whose grid is unknown: without convolutions and near attention."""
        return dataclasses.replace(self, locality="none", neighborhood=0, coarse=0)

    def settings(self) -> dict[str, Any]:
        """The fields by name: keywords of ``torch.ops.t5fx.ttt``."""
        return {name: getattr(self, name) for name in NAMES}

    def flops(self, tokens: int, head_dim: int, value_dim: int, grid: Sequence[int] = ()) -> int:
        """FLOP of one head's matrix products, forward; a multiply-add is two.

        "swiglu" with "dot" and Dv = D, without near attention: 18 N D^2. Near attention has
        2 (D + Dv) for each pair of a query and a key: on the grid the keys of the window, of the
        cells and of the prefix and suffix; all N keys for prefix and suffix queries. Norms,
        convolutions, means and activations, all O(N D), are not counted.
        """
        model = INNER_MODELS[self.inner]
        total = model.flops(tokens, head_dim, value_dim)
        if self.inner_loss == "l2":
            total += model.output_flops(tokens, head_dim, value_dim)
        return total + self.near_flops(tokens, head_dim, value_dim, grid)

    def near_flops(self, tokens: int, head_dim: int, value_dim: int, grid: Sequence[int]) -> int:
        """The part of near attention in `flops`."""
        if not self.is_near:
            return 0
        rest = tokens - math.prod(grid)
        window = math.prod(min(self.neighborhood, size) for size in grid)
        cells = math.prod(min(self.coarse, size) for size in grid)
        pairs = (tokens - rest) * (window + cells + rest) + rest * tokens
        return 2 * pairs * (head_dim + value_dim)


#: The names of the fields.
NAMES = tuple(field.name for field in dataclasses.fields(Variant))
