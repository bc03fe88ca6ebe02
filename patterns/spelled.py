"""Attention spelled by hand: softmax(s q k^T) v, in the orders people write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from t5fx.canon import View
from t5fx.patterns.base import Binding, Pattern, Refusal
from t5fx.patterns.chains import Dims, follow, product
from t5fx.patterns.operands import operand


class Spelled(Pattern):
    """A product of two tensors, a softmax over one of its token axes, a product with a third."""

    name = "spelled"
    anchor = "softmax"

    @staticmethod
    def shape(q: Any, k: Any, v: Any) -> Any:
        scores = torch.matmul(q, k)
        probabilities = torch.softmax(scores, -1)
        return torch.matmul(probabilities, v)

    def bind(self, view: View, found: dict[str, fx.Node]) -> Binding:
        scores, softmax, output = found["matmul"], found["softmax"], found["matmul_1"]
        first = product(view, scores)
        upper = follow(view, scores, softmax, Dims(first.rows, first.columns))
        dims = upper.dims
        axis = view.arg(softmax, "dim")
        axis = None if axis is None else axis % len(view.shape(softmax))
        if axis == dims.rows:  # k q^T with a softmax over its rows
            first = first.swapped()
            dims = Dims(dims.columns, dims.rows)
        elif axis != dims.columns:
            raise Refusal(
                "not-attention", f"the softmax '{softmax.name}' runs over axis {axis}, not the keys"
            )
        lower = follow(view, softmax, output, dims, probabilities=True)
        second = product(view, output)
        if second.left is not lower.end:
            second = second.swapped()
        if second.left_contracted != lower.dims.columns or second.rows_in_left != lower.dims.rows:
            raise Refusal("not-attention", f"'{output.name}' does not sum the values over the keys")
        q, q_factor = operand(view, first.left, first.rows_in_left, first.left_contracted)
        k, k_factor = operand(view, first.right, first.columns_in_right, first.right_contracted)
        v, _ = operand(
            view, second.right, second.right_contracted, second.columns_in_right, scales=False
        )
        if len({len(x.batch) for x in (q, k, v)}) > 1:  # heads visible on some tensors only
            q, q_factor = operand(
                *(view, first.left, first.rows_in_left, first.left_contracted), climb=False
            )
            k, k_factor = operand(
                *(view, first.right, first.columns_in_right, first.right_contracted), climb=False
            )
            v, _ = operand(
                *(view, second.right, second.right_contracted, second.columns_in_right),
                scales=False,
                climb=False,
            )
        kinds = ["b"] * second.rank
        kinds[second.rows], kinds[second.columns] = "t", "c"
        factor = first.factor * upper.factor * q_factor * k_factor
        nodes = (scores, *upper.nodes, softmax, *lower.nodes, output)
        return Binding(
            *(q, k, v, factor, output, tuple(kinds), nodes),
            dropout=lower.dropout,
            temperatures=upper.temperatures,
        )
