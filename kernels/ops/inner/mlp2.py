"""f(x) = silu(x W1) W2."""

from torch.nn.functional import silu

from .base import InnerModel, back, outer_sum, silu_grad


class MLP2(InnerModel):
    name = "mlp2"
    weight_names = ("w1", "w2")

    def weight_shapes(self, head_dim, value_dim):
        return (head_dim, head_dim), (head_dim, value_dim)

    def hidden(self, x, weights):
        a = x @ weights[0]
        return a, silu(a)

    def output(self, hidden, weights):
        return hidden[1] @ weights[1]

    def gradient(self, x, hidden, weights, g):
        a, z = hidden
        da = back(g, weights[1]) * silu_grad(a)
        return [outer_sum(x, da), outer_sum(z, g)]

    def flops(self, num_tokens, head_dim, value_dim):
        # W1: keys, gradient, queries. W2: back through it, gradient, queries.
        return 6 * num_tokens * head_dim * (head_dim + value_dim)
