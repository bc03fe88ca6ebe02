"""Layouts that are given: callables are asked at each call, numbers are held against the call."""

import packed
import pytest
import torch
from packed import call, grid_of, trained

import t5fx
from t5fx.errors import ConfigError, LayoutUnknownError, NothingRewrittenError, RefusedCallError
from t5fx.frontend.positions import objection, positions_in
from t5fx.runtime.lookup import runtimes

CALLED = t5fx.LinearizeConfig(min_tokens=0, grid=grid_of, suffix=0)
GIVEN = t5fx.LinearizeConfig(min_tokens=0, grid=(3, 4))


def linearized(height, width, config=CALLED, **more):
    return trained(t5fx.linearize(packed.model(), (), call(height, width, **more), config=config))


def test_a_callable_is_asked_at_each_call():
    lin = linearized(3, 4)
    with torch.no_grad():
        for size in ((3, 4), (4, 3), (2, 6), (3, 4)):
            wanted = linearized(*size)(**call(*size))
            torch.testing.assert_close(lin(**call(*size)), wanted)


def test_a_module_alone_does_not_guess_between_grids():
    lin = linearized(3, 4)
    tokens, rope = torch.randn(2, 17, 16), torch.ones(1, 1, 17, 8)
    lin.blocks[0](tokens, rope)
    lin(**call(4, 3))
    with pytest.raises(LayoutUnknownError, match=r"17 tokens outside .* 5 \+ 4 x 3 or 5 \+ 3 x 4"):
        lin.blocks[0](tokens, rope)


def test_what_is_computed_again_does_not_guess_between_grids():
    lin = linearized(3, 4)
    lin.checkpointed = True
    (runtime,) = runtimes(lin)
    alive = [lin(**call(3, 4))]
    runtime._again("blocks.0", [])  # of tensors that were not seen before; there was one call
    runtime.end()
    alive.append(lin(**call(4, 3)))
    with pytest.raises(LayoutUnknownError, match="2 calls with different grids"):
        runtime._again("blocks.0", [])


def test_numbers_that_positions_contradict_are_refused():
    lin = linearized(3, 4, GIVEN)
    again = call(3, 4)
    lin(**again)
    with pytest.raises(RefusedCallError, match=r"got 3 x 4: the positions .* of 4 x 3"):
        lin(**call(4, 3))
    with pytest.raises(RefusedCallError, match=r"positions .* of 2 x 6"):
        lin(**call(2, 6))
    with pytest.raises(RefusedCallError, match=r"positions .* of 4 x 4"):  # no 9 tokens of text
        lin(**call(4, 4))
    lin(**again)
    again["ids"].copy_(call(4, 3)["ids"])  # in place, as a buffer that is used again
    with pytest.raises(RefusedCallError, match="positions"):
        lin(**again)
    with pytest.raises(NothingRewrittenError, match=r"positions .* of 4 x 3"):
        linearized(4, 3, GIVEN)
    sites = t5fx.explain(packed.model(), (), call(4, 3), config=GIVEN).sites
    assert {site.reason for site in sites} == {"grid-unknown"}


def test_compiled_code_holds_numbers_against_positions():
    lin = linearized(3, 4, GIVEN)
    lin(**call(3, 4))
    fast = torch.compile(lin, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(**call(3, 4)), lin(**call(3, 4)))
        with pytest.raises(RuntimeError, match="expected positions 3 x 4"):
            fast(**call(4, 3))


def test_numbers_that_integers_contradict_are_refused():
    without = {"ids": torch.zeros(12, 3)}
    lin = t5fx.linearize(packed.model(), (), call(3, 4, height=3, width=4) | without, config=GIVEN)
    with pytest.raises(RefusedCallError, match="the integers 4, 3 among the arguments"):
        lin(**(call(4, 3, height=4, width=3) | without))
    lin(**(call(3, 4, height=8, width=8) | without))  # which say nothing of it


def test_numbers_that_the_graph_contradicts_are_refused():
    class Image(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Conv2d(3, 8, 2, 2)

        def forward(self, x):
            t = self.embed(x).flatten(2).mT.unsqueeze(1)
            return torch.nn.functional.scaled_dot_product_attention(t, t, t)

    lin = t5fx.linearize(Image(), (torch.randn(2, 3, 6, 8),), config=GIVEN)
    lin(torch.randn(1, 3, 6, 8))
    with pytest.raises(RefusedCallError, match=r"graph shows, 0 \+ 4x3 \+ 0, got 0 \+ 3x4"):
        lin(torch.randn(2, 3, 8, 6))
    prefix = t5fx.LinearizeConfig(min_tokens=0, prefix=lambda x: 6 - x.shape[2])
    t5fx.linearize(Image(), (torch.randn(2, 3, 6, 8),), config=prefix)
    wrong = t5fx.LinearizeConfig(min_tokens=0, grid=(2, 4), prefix=4)
    with pytest.raises(NothingRewrittenError, match=r"got 4 \+ 2x4"):
        t5fx.linearize(Image(), (torch.randn(2, 3, 6, 8),), config=wrong)


def test_a_graph_takes_no_callables():
    traced = torch.fx.symbolic_trace(packed.Block())
    with pytest.raises(ConfigError, match="values for a GraphModule"):
        t5fx.linearize(traced, (torch.randn(2, 12, 16), torch.ones(1, 1, 12, 8)), config=CALLED)


def ids(*sides):
    return torch.cartesian_prod(*(torch.arange(n) for n in sides))


def test_positions_are_read_exactly():
    def sides(tensor):
        return [one.sides for one in positions_in([tensor])]

    assert (
        sides(ids(3, 4)) == sides(ids(1, 3, 4) + 7) == sides(ids(3, 4).double()[None]) == [(3, 4)]
    )
    assert sides(ids(2, 3, 4)) == [(2, 3, 4)]
    assert sides(ids(3, 4).flip(1)) == [(3, 4)]  # (x, y) of rows
    for other in (
        ids(3, 4)[:-1],
        ids(3, 4).flip(0),
        ids(3, 4) * 2,
        ids(3, 4) + torch.rand(12, 2),
        torch.stack([ids(3, 4), ids(4, 3)]),
        torch.cat([ids(3, 4), ids(3, 4)]),
        torch.arange(12)[:, None].expand(12, 2),
        torch.zeros(12, 3),
    ):
        assert not sides(other)


@pytest.mark.parametrize(
    ("integers", "against"),
    [
        ((3, 4), False),
        ((4, 3), True),
        ((1, 4, 3), True),
        ((3, 4, 3), False),
        ((3, 4, 4, 3), True),
        ((True, 4, 2), False),
        ((12,), False),
    ],
)
def test_integers_are_read_in_order(integers, against):
    leaves = [torch.ones(2), *integers, None]
    assert bool(objection(leaves, (3, 4), constant=True)) is against
    assert objection(leaves, (3, 4), constant=False) is None


def test_of_three_sides_a_turn_is_the_same_grid():
    for leaves, against in (([3, 4, 2], False), ([2, 4, 3], True), ([4, 2, 3], False)):
        assert bool(objection(leaves, (2, 3, 4), constant=True)) is against
    assert objection([ids(2, 3, 4)], (6, 4), constant=True) is None  # axes taken together
    assert objection([ids(2, 3, 4)], (3, 8), constant=True)
