"""What a token mixer has to declare, and the two kinds of them: by training, by feature maps."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

#: Added to the mean similarity of a query with the keys, by which linear attention divides.
EPS = 1e-6


class TokenMixer(ABC):
    """What makes the node's output of queries, normalised keys and values, per head.

    In the tensors below G counts the pairs (batch item, head): ``q``, ``k`` and ``x`` are
    ``[G, N, D]``, ``v`` is ``[G, N, Dv]``, each weight ``[G, in, out]``, in the order of
    ``weight_names``. D is the channels of a query or key head, Dv those of a value head.
    """

    #: The name by which a configuration asks for this mixer.
    name: str
    #: Names of the weights, in the order in which the methods take them.
    weight_names: tuple[str, ...] = ()
    #: Whether there is an inner loss, so that "dot" and "l2" differ.
    has_loss = False
    #: Whether queries, keys and values are read at all; without, near attention is all there is.
    reads_tokens = True

    @abstractmethod
    def weight_shapes(self, head_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        """``(in, out)`` of each weight of one head, in the order of ``weight_names``."""

    def initial(self, weight: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Fresh values of a weight, ``[H, in, out]``, float32 on the CPU.

        By default a normal of standard deviation 0.02, cut off at +-2, as the method's authors
        have it.
        """
        return (0.02 * normal(shape, generator)).clamp(-2, 2).float()

    @abstractmethod
    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Sequence[Tensor],
        scale: float,
        loss: str,
        share: Tensor | None = None,
    ) -> Tensor:
        """The output, ``[G, N, Dv]``. ``scale``: what softmax multiplied the logits with.

        share: ``[G, N, 1]``, by how much more than 1 / N each key counts in a mean over the N; 0 of
        those that do not count. None: all count alike.
        """

    @abstractmethod
    def flops(self, num_tokens: int, head_dim: int, value_dim: int) -> int:
        """Matrix FLOP of the forward for one head, "dot" loss; a multiply-add is two."""

    def output_flops(self, num_tokens: int, head_dim: int, value_dim: int) -> int:
        """Matrix FLOP that the "l2" loss adds to ``flops`` for one head."""
        return 0


class LinearAttention(TokenMixer):
    """Attention by a feature map phi, no training: phi(q) (phi(k)^T v) / (phi(q) sum phi(k)).

    The sums over keys are means, and `EPS` is added to the denominator.
    """

    @abstractmethod
    def features(
        self, q: Tensor, k: Tensor, weights: Sequence[Tensor], scale: float
    ) -> tuple[Tensor, Tensor]:
        """phi(q) and phi(k), ``[G, N, F]``, not negative."""

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Sequence[Tensor],
        scale: float,
        loss: str,
        share: Tensor | None = None,
    ) -> Tensor:
        if share is None:
            q, k = self.features(q, k, weights, scale)
        else:
            # Features may depend on all keys, such as by the greatest: others are one that counts.
            first = (share > 0).to(torch.uint8).argmax(dim=1, keepdim=True)
            one = k.gather(1, first.expand(-1, -1, k.shape[2]))
            q, k = self.features(q, torch.where(share > 0, k, one), weights, scale)
            k = k * share
        similarity = (q * k.mean(dim=1, keepdim=True)).sum(dim=2, keepdim=True)
        return q @ (outer_sum(k, v) / k.shape[1]) / (similarity + EPS)

    def feature_flops(self, num_tokens: int, features: int, value_dim: int) -> int:
        """Matrix FLOP of the two products with F features for one head."""
        return 4 * num_tokens * features * value_dim


class ProjectedAttention(LinearAttention):
    """Linear attention on q and k times a square weight each, both the identity at the start.

    A subclass has `weight_names`, of q and of k, and `phi`.
    """

    #: Features for each channel of a head.
    expansion = 1

    @abstractmethod
    def phi(self, x: Tensor, scale: float) -> Tensor:
        """The features of projected queries or keys."""

    def weight_shapes(self, head_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        return (head_dim, head_dim), (head_dim, head_dim)

    def initial(self, weight: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.eye(shape[-1], device="cpu").expand(*shape).clone()

    def features(
        self, q: Tensor, k: Tensor, weights: Sequence[Tensor], scale: float
    ) -> tuple[Tensor, Tensor]:
        return self.phi(q @ weights[0], scale), self.phi(k @ weights[1], scale)

    def flops(self, num_tokens: int, head_dim: int, value_dim: int) -> int:
        products = 4 * num_tokens * head_dim * head_dim
        return products + self.feature_flops(num_tokens, self.expansion * head_dim, value_dim)


class InnerModel(TokenMixer):
    """The small network f_W that the TTT node trains for one step on each input, per head.

    The hidden width is M = D. A subclass splits f into ``hidden`` and ``output``: the gradient of
    the "dot" loss needs the hidden activations of the keys but never f itself, so the last product
    is not paid for.
    """

    has_loss = True

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Sequence[Tensor],
        scale: float,
        loss: str,
        share: Tensor | None = None,
    ) -> Tensor:
        """f_W'(q), W' = W - dL/dW: one step on all tokens at once (arXiv 2605.02772)."""
        hidden = self.hidden(k, weights)
        # dL/df is rate * g; the gradient is linear in g, so the factor can wait for the small dW.
        rate = scale / k.shape[1]
        if loss == "dot":
            g, rate = v, -rate
        else:
            g = self.output(hidden, weights) - v
        if share is not None:
            g = g * share
        grads = self.gradient(k, hidden, weights, g)
        updated = [w - rate * dw for w, dw in zip(weights, grads, strict=True)]
        return self.forward(q, updated)

    @abstractmethod
    def hidden(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Everything that ``output`` and ``gradient`` need to know of f(x)."""

    @abstractmethod
    def output(self, hidden: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """f(x), ``[G, N, Dv]``, from the result of ``hidden``."""

    @abstractmethod
    def gradient(
        self, x: Tensor, hidden: Sequence[Tensor], weights: Sequence[Tensor], g: Tensor
    ) -> list[Tensor]:
        """dL/dW of each weight, ``[G, in, out]``, in closed form from ``g`` = dL/df(x)."""

    def output_flops(self, num_tokens: int, head_dim: int, value_dim: int) -> int:
        """Matrix FLOP of ``output`` for one head, which the "l2" loss adds to ``flops``."""
        rows, columns = self.weight_shapes(head_dim, value_dim)[-1]
        return 2 * num_tokens * rows * columns

    def forward(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """f(x): ``[G, N, D]`` -> ``[G, N, Dv]``."""
        return self.output(self.hidden(x, weights), weights)


def silu_grad(a: Tensor) -> Tensor:
    """d silu(a) / da."""
    sigma = a.sigmoid()
    return sigma * (1 + a * (1 - sigma))


def outer_sum(x: Tensor, g: Tensor) -> Tensor:
    """Sum over tokens of x_t^T g_t: ``[G, N, I], [G, N, O]`` -> ``[G, I, O]``."""
    return x.mT @ g


def back(g: Tensor, weight: Tensor) -> Tensor:
    """The gradient g of x @ weight, carried back to x."""
    return g @ weight.mT


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal numbers in float64 on the CPU, the same in every version of torch."""
    # nn.init.trunc_normal_ and randn draw differently from version to version.
    uniform = torch.empty(*shape, dtype=torch.float64, device="cpu")
    uniform.uniform_(-1, 1, generator=generator)
    return math.sqrt(2) * uniform.erfinv()
