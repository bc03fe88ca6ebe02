"""Linear attention with the Performer's positive random features."""

import math

import torch
from torch import Tensor

from .base import LinearAttention, normal

#: Features for each channel of a head.
_FEATURES = 4


class Performer(LinearAttention):
    """phi(x) = exp(x W - |x|^2 / 2), M = 4 D features: FAVOR+ (arXiv 2009.14794).

    x is times the root of the scale that softmax gave the logits, so that phi(q) phi(k) is
    exp(scale q k) in the mean over W. The columns of W are drawn as there, orthogonal in blocks of
    D, with the lengths of normal vectors; they are parameters, so training improves on the draw.
    """

    name = "performer"
    weight_names = ("wf",)

    def weight_shapes(self, head_dim, value_dim):
        return ((head_dim, _FEATURES * head_dim),)

    def initial(self, weight, shape, generator):
        heads, width, _ = shape
        blocks = []
        for _ in range(_FEATURES):
            orthogonal, triangle = torch.linalg.qr(normal((heads, width, width), generator))
            sign = triangle.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
            length = normal((heads, width, width), generator).norm(dim=1, keepdim=True)
            blocks.append(orthogonal * sign * length)
        return torch.cat(blocks, dim=2).float()

    def features(self, q, k, weights, scale):
        root = math.sqrt(scale)
        q, k = self._exponents(root * q, weights[0]), self._exponents(root * k, weights[0])
        # A factor for each query, and one for all keys, is divided out again: none overflows.
        q = q - q.detach().amax(dim=2, keepdim=True)
        return q.exp(), (k - k.detach().amax(dim=(1, 2), keepdim=True)).exp()

    def _exponents(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight - x.square().sum(dim=2, keepdim=True) / 2

    def flops(self, num_tokens, head_dim, value_dim):
        features = _FEATURES * head_dim
        products = 4 * num_tokens * head_dim * features
        return products + self.feature_flops(num_tokens, features, value_dim)
