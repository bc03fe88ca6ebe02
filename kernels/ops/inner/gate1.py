"""f(x) = silu(x W1) * (x W2): one gated layer."""

from torch.nn.functional import silu

from .base import InnerModel, outer_sum, silu_grad


class Gate1(InnerModel):
    name = "gate1"
    weight_names = ("w1", "w2")

    def weight_shapes(self, head_dim, value_dim):
        return (head_dim, value_dim), (head_dim, value_dim)

    def hidden(self, x, weights):
        return x @ weights[0], x @ weights[1]

    def output(self, hidden, weights):
        a, b = hidden
        return silu(a) * b

    def gradient(self, x, hidden, weights, g):
        a, b = hidden
        return [outer_sum(x, g * b * silu_grad(a)), outer_sum(x, g * silu(a))]

    def flops(self, num_tokens, head_dim, value_dim):
        # W1 and W2: keys, gradient, queries.
        return 12 * num_tokens * head_dim * value_dim

    def output_flops(self, num_tokens, head_dim, value_dim):
        return 0
