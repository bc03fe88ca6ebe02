"""Linear attention with Hedgehog's learned feature map."""

import math

import torch
from torch import Tensor

from .base import LinearAttention


class Hedgehog(LinearAttention):
    """phi(x) = [softmax(x W), softmax(-x W)] over the channels of x W, one W for q and one for k.

    "The Hedgehog & the Porcupine" (arXiv 2402.04347), where W starts at the identity and
    exponentials are divided by their sum, as in its authors' code. x is times the root of the
    scale that softmax gave the logits.
    """

    name = "hedgehog"
    weight_names = ("wq", "wk")

    def weight_shapes(self, head_dim, value_dim):
        return (head_dim, head_dim), (head_dim, head_dim)

    def initial(self, weight, shape, generator):
        return torch.eye(shape[-1], device="cpu").expand(*shape).clone()

    def features(self, q, k, weights, scale):
        root = math.sqrt(scale)
        return _both_signs(root * q @ weights[0]), _both_signs(root * k @ weights[1])

    def flops(self, num_tokens, head_dim, value_dim):
        products = 4 * num_tokens * head_dim * head_dim
        return products + self.feature_flops(num_tokens, 2 * head_dim, value_dim)


def _both_signs(x: Tensor) -> Tensor:
    return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1)
