"""Counts the attentions that an eager model really executes; it shares no code with the matcher.

A mode below autograd sees every operator of one call. A fused call is one attention. A softmax is
one if a product of two computed tensors reaches it through elementwise and layout operators, and
its result reaches another such product the same way. What has one of the two products only, such as
linear or outlook attention, is counted apart, as a look-alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {"mm", "bmm", "baddbmm", "addmm", "mv", "addmv", "dot"}
_SOFTMAX = {"_softmax", "_safe_softmax"}
_FUSED = "scaled_dot_product"
_FAST_PATH = {"_native_multi_head_attention", "_transformer_encoder_layer_fwd"}
_LAYOUT = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand"),
    *("clone", "contiguous", "unsqueeze", "squeeze", "_to_copy", "to", "detach", "alias", "slice"),
    *("select", "split", "split_with_sizes", "unbind", "chunk", "unfold", "as_strided", "copy_"),
    *("lift_fresh", "lift_fresh_copy", "squeeze_", "unsqueeze_", "repeat", "flip", "roll", "cat"),
    *("constant_pad_nd", "stack", "narrow", "unflatten", "view_as_real", "view_as_complex"),
    *("index", "diagonal", "split_copy", "view_copy", "slice_scatter", "index_put_"),
}
_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_", "rsub", "neg", "neg_", "tanh"),
    *("masked_fill", "masked_fill_", "where", "clamp", "clamp_min", "clamp_max", "clamp_", "exp"),
    *("minimum", "maximum", "pow", "sigmoid", "relu", "native_dropout", "bernoulli", "abs", "gelu"),
    *("clamp_min_", "clamp_max_", "nan_to_num", "tril", "triu", "softplus", "sqrt", "tril_"),
    *("addcmul", "lerp", "silu", "relu_", "tanh_", "triu_", "nan_to_num_", "log"),
}
_MIXERS = {"mm", "bmm", "addmm", "convolution"}  # with a weight: of heads, in talking heads


@dataclass(frozen=True)
class _Source:
    """A product ("product") or a softmax ("softmax") whose result a tensor carries.

    sizes: those of its two token axes. mixed: it went through a linear map of parameters.
    """

    kind: str
    number: int
    numel: int
    sizes: tuple[int, int]
    mixed: bool = False


@dataclass
class Executed:
    """What one call executed.

    fused, spelled: attentions; look_alikes: softmaxes between a product and none, or none and one.
    """

    fused: int = 0
    spelled: int = 0
    look_alikes: int = 0

    @property
    def attentions(self) -> int:
        return self.fused + self.spelled


@dataclass
class _Softmax:
    scored: bool = False
    weighs: bool = False


@dataclass
class _Trace:
    sources: dict[int, frozenset[_Source]] = field(default_factory=dict)
    weights: set[int] = field(default_factory=set)
    alive: list[Any] = field(default_factory=list)  # so that no id is used twice


class Counter(TorchDispatchMode):
    """Follows products and softmaxes through the operators run under it.

    weights: the tensors that are parameters or buffers; a product with one of them is a linear map.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self._trace = _Trace(weights={id(w) for w in weights}, alive=list(weights))
        self._softmaxes: list[_Softmax] = []
        self._numbers = 0
        self._fused = 0

    @property
    def executed(self) -> Executed:
        both = [s for s in self._softmaxes if s.scored and s.weighs]
        either = [s for s in self._softmaxes if s.scored or s.weighs]
        return Executed(self._fused, len(both), len(either) - len(both))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        outputs = [a for a in pytree.tree_leaves(result) if isinstance(a, Tensor)]
        self._trace.alive += [inputs, outputs]
        name = func._schema.name.partition("::")[2]
        for output, sources in self._read(name, args, inputs, outputs):
            if sources:
                self._trace.sources[id(output)] = sources
            else:
                self._trace.sources.pop(id(output), None)
        return result

    def _read(
        self, name: str, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]
    ) -> list[tuple[Tensor, frozenset[_Source]]]:
        if _FUSED in name or name in _FAST_PATH:
            self._fused += 1
            return []
        if name in _SOFTMAX:
            return self._softmax(inputs[0], args[1], outputs[0])
        if name in _PRODUCTS and not any(self._is_weight(i) for i in inputs[-2:]):
            return self._product(inputs[-2:], outputs[0])
        if name in _MIXERS:
            sources = [
                _Source(s.kind, s.number, s.numel, s.sizes, mixed=True)
                for s in self._carried(inputs)
                if s.numel == outputs[0].numel()
            ]
            return [(outputs[0], frozenset(sources))]
        if name in _LAYOUT and inputs and all(map(self._is_weight, inputs)):
            self._trace.weights.update(map(id, outputs))
        if name in _LAYOUT | _ELEMENTWISE:
            return [(output, self._carried(inputs)) for output in outputs]
        return []

    def _softmax(
        self, scores: Tensor, dim: int, probabilities: Tensor
    ) -> list[tuple[Tensor, frozenset[_Source]]]:
        found = _Softmax(scored=any(self._meant(s, scores) for s in self._of("product", [scores])))
        self._softmaxes.append(found)
        number, size = len(self._softmaxes) - 1, probabilities.shape[dim]
        source = _Source("softmax", number, probabilities.numel(), (size, size))
        return [(probabilities, frozenset([source]))]

    def _product(
        self, factors: list[Tensor], out: Tensor
    ) -> list[tuple[Tensor, frozenset[_Source]]]:
        for factor in factors:
            for source in self._of("softmax", [factor]):
                if self._meant(source, factor):
                    self._softmaxes[source.number].weighs = True
        self._numbers += 1
        sizes = (*out.shape[-2:], 1, 1)[:2]
        source = _Source("product", self._numbers, out.numel(), (sizes[0], sizes[1]))
        return [(out, frozenset([source]))]

    @staticmethod
    def _meant(source: _Source, tensor: Tensor) -> bool:
        """Whether a tensor still has the token axes of a source that went through a linear map."""
        return not source.mixed or all(size in tensor.shape for size in source.sizes)

    def _carried(self, tensors: list[Tensor]) -> frozenset[_Source]:
        return frozenset().union(*(self._trace.sources.get(id(t), ()) for t in tensors))

    def _of(self, kind: str, tensors: list[Tensor]) -> list[_Source]:
        return [s for s in self._carried(tensors) if s.kind == kind]

    def _is_weight(self, tensor: Tensor) -> bool:
        return id(tensor) in self._trace.weights


def count(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[Executed, Any]:
    """What one call of the model executes, and its outputs.

    torch's own fast path of nn.MultiheadAttention is off: `torch.export` does not take it either.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = Counter([*model.parameters(), *model.buffers()])
    try:
        with torch.no_grad(), counter:
            outputs = model(*args, **(kwargs or {}))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.executed, outputs
