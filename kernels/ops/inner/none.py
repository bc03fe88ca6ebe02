"""Nothing: near attention alone."""

from .base import TokenMixer


class Nothing(TokenMixer):
    """Zero, so that the node is near attention alone: softmax in a sliding window.

    "CLEAR: Conv-Like Linearization" (arXiv 2412.16112) is this, with a round window in place of a
    square one: LinearizeConfig(inner="none", key_norm="none", locality="none", coarse=0,
    neighborhood=...).
    """

    name = "none"
    reads_tokens = False

    def weight_shapes(self, head_dim, value_dim):
        return ()

    def mix(self, q, k, v, weights, scale, loss, share=None):
        return v.new_zeros(v.shape)

    def flops(self, num_tokens, head_dim, value_dim):
        return 0
