"""Muon on stacks of matrices does what torch's does on each."""

import pytest
import torch

from t5fx.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_each_matrix_of_a_stack_is_stepped_as_torch_does(shape):
    stack = torch.nn.Parameter(torch.randn(2, 3, *shape))
    single = [torch.nn.Parameter(m.clone()) for m in stack.detach().flatten(0, 1)]
    ours = Muon([stack], 0.1, momentum=0.9)
    theirs = torch.optim.Muon(
        single, 0.5, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        gradient = torch.randn_like(stack)
        stack.grad = gradient
        for parameter, part in zip(single, gradient.flatten(0, 1), strict=True):
            parameter.grad = part.clone()
        ours.step()
        theirs.step()
    # torch iterates in bfloat16
    torch.testing.assert_close(
        stack.detach().flatten(0, 1), torch.stack(single).detach(), rtol=0, atol=2e-2
    )


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 5), (5, 8)])
def test_singular_values_come_near_one(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(*shape, dtype=torch.float64), 8))
    assert (values > 0.6).all() and (values < 1.3).all()


def test_zero_gradient_changes_nothing():
    parameter = torch.nn.Parameter(torch.randn(2, 4, 4))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    Muon([parameter], 0.1).step()
    assert torch.equal(parameter.detach(), before)
