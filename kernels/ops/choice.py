"""Which implementation ``impl="auto"`` is for a call, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import trust
from .checks import mask_obstacle
from .trust import Question
from .variant import NAMES, Variant

#: The argument ``impl`` of the operator where "auto" has become the Triton kernels. In a graph it
#: is what tells compilers' caches a graph with the kernels from one without: they look at the graph
#: before the operator is decomposed.
TRUSTED = "trusted"

#: The widest head that the kernels take, in channels.
_MAX_WIDTH = 256
#: The most cells of near attention that they take: what a query has of each is in registers.
_MAX_CELLS = 128
#: And the most channels of all cells together, cells and channels of a head padded to powers of
#: two: all mean keys are on the chip at once.
_MAX_MEANS = 2**13
_HALF = (torch.float16, torch.bfloat16)


#: Settings whose values say nothing of whether there are kernels for the rest.
_ANY = ("scale", "key_norm_eps", "neighborhood", "coarse", "mix", "qk_affine")


class Call(NamedTuple):
    """What a choice depends on.

    dtype: of q, k and v, or None where they differ; widest: of all tensors. axes: of the grid.
    trained: whether a gradient is recorded. node: all settings of the node but ``impl``. masked:
    whether there is a key mask.
    """

    device: torch.device
    dtype: torch.dtype | None
    widest: torch.dtype
    head_dim: int
    value_dim: int
    axes: int
    trained: bool
    node: tuple[tuple[str, Any], ...]
    masked: bool = False

    @property
    def written_out(self) -> bool:
        """Whether there is more than the reference for its settings, all of which are known."""
        node = {name: value for name, value in self.node if name != "scale"}
        if node.keys() != set(NAMES) or (self.masked and not node["key_norm_eps"]):
            return False
        return Variant(**node).is_written_out


class Choice(NamedTuple):
    """impl: "triton", "c++", "written-out" (one operator in PyTorch with its own backward) or
    "reference"."""

    impl: str
    reason: str


def choose(impl: str, call: Call) -> Choice:
    """What runs, and why. On a GPU the answer may take a check of the kernels: see `trust`."""
    if impl != "auto":
        return Choice(impl, "asked for")
    kind = call.device.type
    if is_gpu(call.device):
        obstacle = _obstacle(call)
        if obstacle is None:
            found = trust.verdict(_question(call), call.device)
            if found.passed:
                return Choice("triton", f"checked on this GPU: {found.reason}")
            what = "failed" if found.status == "failed" else "was impossible"
            obstacle = f"the check of the Triton kernels {what}: {found.reason}"
        return _without_kernels(call, obstacle)
    if kind == "cpu" and call.written_out and call.widest == torch.float32:
        return Choice("c++", "a CPU, sums of float32; compiled once for a machine")
    if kind == "meta":
        return _without_kernels(
            call, "tensors on the meta device; chosen again on the device where it runs"
        )
    return _without_kernels(
        call, f"{kind}, sums of {_name(call.widest)}: there is no other implementation"
    )


def is_gpu(device: torch.device) -> bool:
    """Whether the Triton kernels are for that device; torch calls AMD's "cuda" too."""
    return device.type == "cuda"


def _without_kernels(call: Call, reason: str) -> Choice:
    if call.trained and call.written_out:
        return Choice("written-out", reason)
    return Choice("reference", reason)


def _obstacle(call: Call) -> str | None:
    """Why the kernels are out of the question, checked or not."""
    if trust.is_off():
        return f"switched off by {trust.SWITCH}"
    if not call.written_out:
        usual = Variant().settings()
        unusual = [f"{n}={v!r}" for n, v in call.node if n not in _ANY and usual.get(n) != v]
        return f"no kernels for {', '.join(unusual) or 'a node with unknown settings'}"
    if call.dtype is None:
        return "q, k and v differ in dtype"
    if call.dtype not in _HALF:
        return f"{_name(call.dtype)}: no measurement shows the kernels to be faster in it"
    if call.widest != torch.float32:
        return f"parameters of {_name(call.widest)}"
    if max(call.head_dim, call.value_dim) > _MAX_WIDTH:
        return f"heads of more than {_MAX_WIDTH} channels"
    if call.masked:
        node = {name: value for name, value in call.node if name != "scale"}
        if (obstacle := mask_obstacle(Variant(**node), call.dtype)) is not None:
            return f"no kernels for {obstacle}"
    return cells_obstacle(call.axes, dict(call.node)["coarse"], _width(call))


def cells_obstacle(axes: int, coarse: int, width: int) -> str | None:
    """Why the kernels cannot take so many cells along each axis, with heads of ``width``, padded;
    None where they can.
    """
    cells = coarse**axes if coarse else 0
    most = min(_MAX_CELLS, _MAX_MEANS // width)
    if cells <= most:
        return None
    return f"more than {most} coarse cells with heads of up to {width} channels: {cells}"


def _width(call: Call) -> int:
    """A head's, padded."""
    return max(16, 1 << (max(call.head_dim, call.value_dim) - 1).bit_length())


def _question(call: Call) -> Question:
    node = tuple((name, value) for name, value in call.node if name != "scale")
    needs_grid = Variant(**dict(node)).needs_grid
    return Question(
        dtype=_name(call.dtype or call.widest),
        width=_width(call),
        axes=call.axes if needs_grid else 0,
        direction="backward" if call.trained else "forward",
        node=node,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def settings_of(node: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """`Call.node` of the arguments of a node."""
    return tuple(sorted((n, v) for n, v in node.items() if n != "impl"))


def resolved(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: Sequence[Tensor],
    axes: int,
    node: Mapping[str, Any],
    masked: bool = False,
) -> str:
    """The operator's argument ``impl`` for a call: of "auto" on a GPU `TRUSTED`, if they are.

    The rest the operator chooses itself. What is exported stays "auto": it is for other machines.
    """
    if impl != "auto" or not is_gpu(q.device):
        return impl
    dtype = q.dtype if q.dtype == k.dtype == v.dtype else None
    widest = torch.float32
    trained = False
    for tensor in (q, k, v, *parameters):
        widest = torch.promote_types(widest, tensor.dtype)
        trained = trained or tensor.requires_grad
    trained = trained and torch.is_grad_enabled()
    sizes = int(q.shape[3]), int(v.shape[3])
    return _argument(q.device, dtype, widest, *sizes, axes, trained, settings_of(node), masked)


def _argument(*about: Any) -> str:
    if torch.compiler.is_exporting():  # asked here: Dynamo of torch 2.11 takes it for true, always
        return "auto"
    return TRUSTED if choose("auto", Call(*about)).impl == "triton" else "auto"


# What torch.compiler.assume_constant_result does, which imports all of Dynamo: a constant in its
# graphs, where it would else trace how a verdict is looked up.
_argument._dynamo_marked_constant = True  # type: ignore[attr-defined]
