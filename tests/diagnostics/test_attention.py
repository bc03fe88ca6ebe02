"""Key shift and implicit attention against what they are defined as."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from t5fx.diagnostics.attention import (
    implicit_attention,
    key_shift,
    node_attention,
    softmax_attention,
)
from t5fx.kernels import TTT

close = torch.testing.assert_close


def test_key_shift_of_keys_that_are_known():
    keys = torch.randn(2, 3, 20, 8)
    centred = keys - keys.mean(-2, keepdim=True)
    close(key_shift(centred), torch.zeros(2, 3), atol=1e-6, rtol=0)
    close(key_shift(keys[..., :1, :].expand_as(keys)), torch.ones(2, 3))
    close(key_shift(torch.zeros(1, 4, 8)), torch.zeros(1))
    close(key_shift(torch.tensor([[3.0, 0.0], [0.0, 4.0]])), torch.tensor(2.5 / 3.5))
    assert key_shift(keys.half()).dtype == torch.float32
    # Independent keys, as in a model that nobody has trained: 1/sqrt(N), the paper's 0.07.
    drawn = key_shift(torch.randn(64, 196, 64)).mean().item()
    assert drawn == pytest.approx(196**-0.5, rel=0.05)


def blocks(attend, v, queries):
    """Mean diagonals of the Jacobian's blocks [B, H, Q, N], the whole Jacobian made."""
    jacobian = torch.autograd.functional.jacobian(attend, v)
    found = torch.einsum("bhncbhmc->bhnm", jacobian) / v.shape[-1]
    return found[:, :, queries]


def test_softmax_is_its_own_implicit_attention():
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64).unbind()

    def attend(values):
        return scaled_dot_product_attention(q, k, values, scale=0.3)

    wanted = softmax_attention(q, k, 0.3, (0, 6, 2))
    close(wanted.sum(-1), torch.ones(2, 3, 3, dtype=torch.float64))
    close(implicit_attention(attend, v, (0, 6, 2)), wanted)
    close(blocks(attend, v, [0, 6, 2]), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"inner": "mlp2", "inner_loss": "l2", "key_norm": "none"},
        {"inner": "mlp3", "locality": "dwc_v"},
        {"inner": "gate1", "locality": "none", "qk_affine": True},
        {"neighborhood": 3, "coarse": 2},
        {"neighborhood": 3, "mix": "half", "qk_affine": True},
        {"coarse": 2, "locality": "none"},
        {"inner": "linear", "neighborhood": 3},
        {"inner": "none", "key_norm": "none", "locality": "none", "neighborhood": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(("grid", "prefix", "suffix"), [((3, 3), 1, 1), ((5,), 0, 0)], ids=str)
def test_node_against_the_whole_jacobian(settings, grid, prefix, suffix):
    """Of weights so large that the output is far from linear in the values."""
    node = TTT(2, 4, 3, len(grid), scale=0.5, dtype=torch.float64, **settings)
    with torch.no_grad():
        for parameter in node.parameters():
            parameter.copy_(torch.randn_like(parameter))
    tokens = prefix + torch.Size(grid).numel() + suffix
    q, k, v = (torch.randn(1, 2, tokens, d, dtype=torch.float64) for d in (4, 4, 3))
    queries = [0, tokens - 1, prefix + 3]
    wanted = blocks(lambda values: node(q, k, values, grid, prefix), v, queries)
    found = node_attention(node, q, k, v, queries, grid=grid, prefix=prefix)
    close(found, wanted)
    # It is the derivative at these values: one for all only where nothing is trained.
    elsewhere = node_attention(node, q, k, 3 * v, queries, grid=grid, prefix=prefix)
    assert torch.allclose(elsewhere, wanted) == (settings.get("inner") in ("linear", "none"))
    assert all(parameter.grad is None for parameter in node.parameters())


def test_prefix_and_suffix_tokens_have_exact_attention_beside_near_attention():
    node = TTT(2, 4, 4, 2, scale=0.5, neighborhood=3, coarse=2)
    q, k, v = torch.randn(3, 1, 2, 11, 4).unbind()
    found = node_attention(node, q, k, v, (0, 10), grid=(3, 3), prefix=1)
    close(found, softmax_attention(q, k, 0.5, (0, 10)))


def test_half_precision_is_measured_in_float32():
    node = TTT(2, 4, 4, 2, scale=0.5, neighborhood=3).to(torch.bfloat16)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.bfloat16).unbind()
    found = node_attention(node, q, k, v, (4,), grid=(3, 3))
    wide = node_attention(node.float(), q.float(), k.float(), v.float(), (4,), grid=(3, 3))
    assert found.dtype == torch.float32
    close(found, wide)


def test_tokens_that_a_mask_hides_are_as_if_they_were_not_there():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64).unbind()
    mask = (torch.arange(9) < 7)[None]
    short = [x[:, :, :7] for x in (q, k, v)]
    close(key_shift(k, mask[:, None]), key_shift(short[1]))
    found = softmax_attention(q, k, 0.3, (0, 5), mask[:, None])
    close(found[..., :7], softmax_attention(*short[:2], 0.3, (0, 5)))
    node = TTT(2, 4, 4, 2, scale=0.3, neighborhood=3, coarse=2).double()
    place = {"grid": (2, 3), "prefix": 1}
    maps = node_attention(node, q, k, v, (0, 5), **place, key_mask=mask)
    close(maps[..., :7], node_attention(node, *short, (0, 5), **place))
    assert not maps[..., 7:].any() and not found[..., 7:].any()
