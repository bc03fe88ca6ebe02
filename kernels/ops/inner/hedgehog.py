"""Linear attention with Hedgehog's learned feature map."""

import math

import torch

from .base import ProjectedAttention


class Hedgehog(ProjectedAttention):
    """phi(x) = [softmax(x W), softmax(-x W)] over the channels of x W, one W for q and one for k.

    "The Hedgehog & the Porcupine" (arXiv 2402.04347), where W starts at the identity and
    exponentials are divided by their sum, as in its authors' code. x is times the root of the
    scale that softmax gave the logits.
    """

    name = "hedgehog"
    weight_names = ("wq", "wk")
    expansion = 2

    def phi(self, x, scale):
        x = math.sqrt(scale) * x
        return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1)
