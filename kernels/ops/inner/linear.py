"""Linear attention with phi = elu + 1, plain and on projected queries and keys."""

from torch.nn.functional import elu

from .base import LinearAttention, ProjectedAttention


class Linear(LinearAttention):
    """phi(x) = elu(x) + 1 ("Transformers are RNNs", arXiv 2006.16236); no new parameters."""

    name = "linear"

    def weight_shapes(self, head_dim, value_dim):
        return ()

    def features(self, q, k, weights, scale):
        return elu(q) + 1, elu(k) + 1

    def flops(self, num_tokens, head_dim, value_dim):
        return self.feature_flops(num_tokens, head_dim, value_dim)


class ProjectedLinear(ProjectedAttention):
    """Linear attention on q Pq and k Pk, which start as q and k (arXiv 2605.02772, "ProjQK")."""

    name = "linear_projqk"
    weight_names = ("pq", "pk")

    def phi(self, x, scale):
        return elu(x) + 1
