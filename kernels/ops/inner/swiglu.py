"""f(x) = (silu(x W1) * (x W2)) W3, the default inner model."""

from torch.nn.functional import silu

from .base import InnerModel, back, outer_sum, silu_grad


class SwiGLU(InnerModel):
    name = "swiglu"
    weight_names = ("w1", "w2", "w3")

    def weight_shapes(self, head_dim, value_dim):
        return (head_dim, head_dim), (head_dim, head_dim), (head_dim, value_dim)

    def hidden(self, x, weights):
        a, b = x @ weights[0], x @ weights[1]
        return a, b, silu(a) * b

    def output(self, hidden, weights):
        return hidden[2] @ weights[2]

    def gradient(self, x, hidden, weights, g):
        a, b, z = hidden
        dz = back(g, weights[2])
        da, db = dz * b * silu_grad(a), dz * silu(a)
        return [outer_sum(x, da), outer_sum(x, db), outer_sum(z, g)]

    def flops(self, num_tokens, head_dim, value_dim):
        # W1 and W2: keys, gradient, queries. W3: back through it, gradient, queries.
        return 6 * num_tokens * head_dim * (2 * head_dim + value_dim)
