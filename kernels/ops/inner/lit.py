"""Linear attention with LiT's feature map."""

from torch.nn.functional import relu

from .base import LinearAttention


class LiT(LinearAttention):
    """phi(x) = relu(x); no new parameters.

    "LiT: Delving into a Simplified Linear Diffusion Transformer" (arXiv 2501.12976) has it with a
    depthwise convolution of the values: locality "dwc_v".
    """

    name = "lit"

    def weight_shapes(self, head_dim, value_dim):
        return ()

    def features(self, q, k, weights, scale):
        return relu(q), relu(k)

    def flops(self, num_tokens, head_dim, value_dim):
        return self.feature_flops(num_tokens, head_dim, value_dim)
