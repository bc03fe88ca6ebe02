"""The TTT node: closed-form reference, operator ``torch.ops.t5fx.ttt``, function and module."""

from .errors import NodeArgumentError
from .functional import flops, ttt
from .inner import INNER_MODELS, InnerModel, TokenMixer, inner_model
from .module import TTT

__all__ = [
    "INNER_MODELS",
    "TTT",
    "InnerModel",
    "NodeArgumentError",
    "TokenMixer",
    "flops",
    "inner_model",
    "ttt",
]
