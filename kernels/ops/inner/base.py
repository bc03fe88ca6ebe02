"""What an inner model of the TTT node has to declare."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class InnerModel(ABC):
    """The small network f_W that the node trains for one step on each input, per head.

    In the tensors below G counts the pairs (batch item, head): ``x`` is ``[G, N, D]``, each weight
    ``[G, in, out]``, in the order of ``weight_names``. D is the channels of a query or key head,
    Dv those of a value head; the hidden width is M = D.

    A subclass splits f into ``hidden`` and ``output``: the gradient of the "dot" loss needs the
    hidden activations of the keys but never f itself, so the last product is not paid for.
    """

    #: The name by which a configuration asks for this model.
    name: str
    #: Names of the weights, in the order in which the methods take them.
    weight_names: tuple[str, ...]

    @abstractmethod
    def weight_shapes(self, head_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        """``(in, out)`` of each weight of one head, in the order of ``weight_names``."""

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

    @abstractmethod
    def flops(self, num_tokens: int, head_dim: int, value_dim: int) -> int:
        """Matrix FLOP of the node's forward for one head, "dot" loss; a multiply-add is two."""

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
