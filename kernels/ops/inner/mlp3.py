"""f(x) = silu(silu(x W1) W2) W3."""

from torch.nn.functional import silu

from .base import InnerModel, back, outer_sum, silu_grad


class MLP3(InnerModel):
    name = "mlp3"
    weight_names = ("w1", "w2", "w3")

    def weight_shapes(self, head_dim, value_dim):
        return (head_dim, head_dim), (head_dim, head_dim), (head_dim, value_dim)

    def hidden(self, x, weights):
        a1 = x @ weights[0]
        z1 = silu(a1)
        a2 = z1 @ weights[1]
        return a1, z1, a2, silu(a2)

    def output(self, hidden, weights):
        return hidden[3] @ weights[2]

    def gradient(self, x, hidden, weights, g):
        a1, z1, a2, z2 = hidden
        da2 = back(g, weights[2]) * silu_grad(a2)
        da1 = back(da2, weights[1]) * silu_grad(a1)
        return [outer_sum(x, da1), outer_sum(z1, da2), outer_sum(z2, g)]

    def flops(self, num_tokens, head_dim, value_dim):
        # W1: keys, gradient, queries. W2: these and back through it. W3: back, gradient, queries.
        return 2 * num_tokens * head_dim * (7 * head_dim + 3 * value_dim)
