"""flex_attention without a score_mod and without a mask, which is plain attention."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, fx

from t5fx.analysis.masks import interval
from t5fx.graph.view import View
from t5fx.patterns.base import Binding, Pattern, Refusal
from t5fx.patterns.operands import fused_binding


@fx.wrap
def flex_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's, as one node of a traced graph; imported when it runs, for that takes a second."""
    from torch.nn.attention import flex_attention as flex

    result = flex.flex_attention(q, k, v, **options)
    assert isinstance(result, Tensor)
    return result


def _causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _near(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query - key).abs() < 3


def _biased(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score + (query - key)


def _masked(mask: Any, q: Tensor) -> Any:
    from torch.nn.attention import flex_attention as flex

    tokens = q.shape[2]
    return flex.create_block_mask(mask, None, None, tokens, tokens, device=q.device)


class Flex(Pattern):
    """torch.nn.attention.flex_attention, as torch.export and Dynamo keep it: one operator."""

    name = "flex"
    anchor = "flex_attention"
    whole = True

    examples: ClassVar = {
        "plain": lambda q, k, v: flex_attention(q, k, v),
        "scale given": lambda q, k, v: flex_attention(2 * q, k, v, scale=q.shape[-1] ** -0.5 / 2),
        "grouped heads": lambda q, k, v: flex_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    }
    rejects: ClassVar = {
        "scores with a bias": (
            "scores-changed",
            lambda q, k, v: flex_attention(q, k, v, score_mod=_biased),
        ),
        "causal": (
            "causal",
            lambda q, k, v: flex_attention(q, k, v, block_mask=_masked(_causal, q)),
        ),
        "only near keys": (
            "masked",
            lambda q, k, v: flex_attention(q, k, v, block_mask=_masked(_near, q)),
        ),
    }

    @staticmethod
    def shape(q: Any, k: Any, v: Any) -> Any:
        return flex_attention(q, k, v)

    def bind(self, view: View, found: dict[str, fx.Node]) -> Binding:
        node = found["flex_attention"]
        query, key, value, score_mod, block_mask, scale = node.args[:6]
        _plain(view, node, score_mod, block_mask)
        return fused_binding(view, node, (query, key, value), scale)


def _plain(view: View, node: fx.Node, score_mod: Any, block_mask: Any) -> None:
    """Raise `Refusal` unless the scores stay what they are and no key is hidden."""
    changes, hides = (
        view.attribute(n) if isinstance(n, fx.Node) else None for n in (score_mod, block_mask[-1])
    )
    if not isinstance(changes, fx.GraphModule) or not isinstance(hides, fx.GraphModule):
        raise Refusal("scores-changed", f"the score_mod of '{node.name}' could not be read")
    first = next(iter(changes.graph.nodes))
    if _result(changes) is not first:
        raise Refusal("scores-changed", f"'{node.name}' has a score_mod")
    inner, result = View(hides.graph, hides), _result(hides)
    if interval(inner, result, {}) == (1.0, 1.0):
        return
    if inner.op(result) in ("ge", "le", "gt", "lt") and all(
        n.op == "placeholder" for n in result.all_input_nodes
    ):
        raise Refusal("causal", f"the mask of '{node.name}' compares positions of query and key")
    raise Refusal("masked", f"'{node.name}' has a mask that could not be proved to hide nothing")


def _result(gm: fx.GraphModule) -> Any:
    result = gm.graph.output_node().args[0]
    return result[0] if isinstance(result, tuple | list) else result
