"""What a pattern is: a shape in plain PyTorch, and how its nodes bind to q, k, v and the scale.

A pattern file defines one subclass of `Pattern`. Its `shape` is a plain PyTorch function; traced,
it is the graph that the matcher looks for around each anchor, seen through everything harmless
between its operators (casts, layout, scaling). `bind` then says what the found nodes mean, or
refuses them with a reason of the closed set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from t5fx.analysis.key_masks import KeyMask
from t5fx.graph.view import View


class Unlike(Exception):
    """Nodes that have a pattern's shape, and are something else that nobody takes for attention."""


class Refusal(Exception):
    """A candidate that must not be rewritten: `reason` of the closed set, `detail` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass
class Operand:
    """A tensor of q, k or v as the graph has it.

    like: a node of the graph with the operand's axes: `batch` (batch and heads, in order), `token`
    and `channel` are positions in it. node: where the value comes from, constant scales taken out:
    `like` itself, or a tensor above it to which the layout nodes `replay` (topmost first) are to be
    applied again. factor: a constant scale that `node` holds still, to be divided out.
    """

    like: fx.Node
    batch: tuple[int, ...]
    token: int
    channel: int
    node: fx.Node
    replay: tuple[fx.Node, ...] = ()
    factor: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.batch) + 2


@dataclass
class Binding:
    """What a match means: o = softmax(scale q k^T) v, written to `output`.

    heads: which of the operands' outer axes counts heads, None for a single head; merged: number
    of heads where batch items and heads share that axis, heads innermost. Both are filled in once
    the axes of the graph are known.

    output_axes: for each axis of `output`, "b" (batch or head, in order), "t" or "c".
    dropout: probability of an active dropout of the probabilities, or the node of a dropout
    module, or 0. temperatures: mul/div nodes that scale the scores by a learned number a head.
    masks: what hides keys; a key counts where all of them let it.
    """

    q: Operand
    k: Operand
    v: Operand
    scale: float
    output: fx.Node
    output_axes: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    groups: int = 1
    dropout: Any = 0.0
    temperatures: tuple[fx.Node, ...] = ()
    heads: int | None = None
    merged: int = 1
    masks: tuple[KeyMask, ...] = ()

    def heads_in(self, count: int) -> int | None:
        """Which of so many axes of batch and heads counts heads alone; None where none does."""
        if count == len(self.q.batch):
            return self.heads if self.merged == 1 else None
        return 1 if count == 2 and self.merged > 1 else None


class Pattern:
    """Base of all pattern families; see the module's docstring."""

    name: ClassVar[str]
    anchor: ClassVar[str]  # canonical operator that starts the search
    #: Whether the anchor is all of an attention: an operator of `query`, `key` and `value` that
    #: yields the output, alone or as the first of its results.
    whole: ClassVar[bool] = False
    #: Whether the anchor is seldom in anything but attention.
    telling: ClassVar[bool] = True
    #: Spellings by name, for the tests: functions of q, k, v [B, H, N, D] that compute attention
    #: with the scale 1/sqrt(D), and functions that do not, with the reason that each has to get.
    examples: ClassVar[dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]]
    rejects: ClassVar[dict[str, tuple[str | None, Callable[[Tensor, Tensor, Tensor], Tensor]]]]

    @staticmethod
    def shape(*tensors: Any) -> Any:
        """The family's graph as plain PyTorch code; arguments stand for any tensor."""
        raise NotImplementedError

    def bind(self, view: View, found: dict[str, fx.Node]) -> Binding:
        """The meaning of the found nodes (by name in the traced `shape`).

        Raises `Refusal` where they are not an attention that may be rewritten, `Unlike` where they
        are not even worth a word.
        """
        raise NotImplementedError

    def missed(
        self, view: View, anchor: fx.Node, before: list[fx.Node], after: list[fx.Node]
    ) -> Refusal | None:
        """What to say of an anchor without the shape around it; None where it is not worth a word.

        before, after: the products above and below the anchor, through everything harmless.
        """
        return None
