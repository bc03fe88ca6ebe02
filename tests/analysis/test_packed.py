"""Packed tokens: a list of their positions, or a rotary table, tells the grid, or it is refused."""

import packed
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packed import TEXT, call, trained

import t5fx
from t5fx.errors import NothingRewrittenError, RefusedCallError
from t5fx.frontend.positions import Positions, lists_in
from t5fx.runtime.lookup import runtimes

CONFIG = t5fx.LinearizeConfig(min_tokens=0)


def product(*sides):
    return torch.cartesian_prod(*(torch.as_tensor(side).float() for side in sides))


def image(rows, columns, number=0.0):
    return product([number], torch.arange(rows), torch.arange(columns))


def with_ids(ids):
    return call(1, len(ids)) | {"ids": ids}


def explained(model, arguments):
    """(what became of them, why) of the sites, which are alike."""
    sites = t5fx.explain(model, (), arguments, config=CONFIG).sites
    (found,) = {(s.reason or (s.prefix, s.grid, s.suffix), s.detail) for s in sites}
    return found


def converted(arguments):
    return trained(t5fx.linearize(packed.model(), (), arguments, config=CONFIG))


# --- lists of positions ---------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    sides=st.lists(st.integers(2, 5), min_size=2, max_size=3),
    more=st.integers(0, 1),
    first=st.integers(-3, 9),
    swaps=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=3),
    items=st.integers(0, 2),
)
def test_only_the_exact_product_of_aranges_is_a_grid(sides, more, first, swaps, items):
    ids = product(*(torch.arange(first, first + n) for n in sides), *[[0.0]] * more)
    batch = [ids] * items if items else [ids]
    found = lists_in([None, torch.stack(batch) if items else ids])
    assert found == {1: Positions(1, tuple(sides), tuple(range(len(sides))))}
    assert found[1].again(torch.stack(batch)) == tuple(sides)
    order = torch.arange(len(ids))
    for a, b in swaps:
        order[[a % len(ids), b % len(ids)]] = order[[b % len(ids), a % len(ids)]]
    permuted = ids[order]
    assume(not torch.equal(permuted, ids))
    told = lists_in([permuted]).get(0)
    assert not isinstance(told, Positions) or (told.sides, told.columns) != (
        found[1].sides,
        found[1].columns,
    )
    assert found[1].again(permuted) is None
    assert found[1].again(torch.stack([ids, permuted])) is None


def test_one_column_that_varies_is_a_text():
    assert lists_in([product([0], [0], range(7)), torch.zeros(7, 3), torch.ones(2, 7, 4)]) == {}


@settings(max_examples=4)
@given(rows=st.integers(2, 5), columns=st.integers(2, 5), seed=st.integers(0, 99))
def test_positions_tell_the_grid_and_permuted_ones_do_not(rows, columns, seed):
    layout = (TEXT, (rows, columns), 0)
    assert explained(packed.model(), call(rows, columns)) == (layout, "")
    ids = call(rows, columns)["ids"]
    generator = torch.Generator().manual_seed(seed)
    permuted = ids[torch.randperm(len(ids), generator=generator)]
    assume(not isinstance(lists_in([permuted])[0], Positions))  # one of columns first is one too
    reason, why = explained(packed.model(), with_ids(permuted))
    assert reason == "grid-unknown"
    assert "their positions, in the argument 'ids', are " in why


def test_images_one_after_the_other():
    alike = torch.cat([image(3, 4), image(3, 4, 1)])
    assert explained(packed.model(), with_ids(alike))[0] == (TEXT, (2, 3, 4), 0)
    for other, shown in ((image(2, 5, 1), "2 x 5"), (image(3, 4, 10), "3 x 4")):
        reason, why = explained(packed.model(), with_ids(torch.cat([image(3, 4), other])))
        assert reason == "grid-unknown"
        assert "positions, in the argument 'ids', are those of 2 grids" in why
        assert f"3 x 4, then {shown}; the node takes one" in why


def test_positions_of_other_tokens_tell_nothing():
    class Model(packed.Packed):
        def forward(self, hidden, text, ids):
            return super().forward(hidden, text[:, :-1], ids[:-1])

    arguments = call(3, 4)
    arguments["hidden"] = arguments["hidden"][:, :-1]  # as many as the rows that are left
    assert explained(Model(), arguments)[0] == "grid-unknown"


def test_one_capture_serves_every_grid_with_its_own():
    lin = converted(call(3, 4))
    (runtime,) = runtimes(lin)
    with torch.no_grad():
        for rows, columns in ((3, 4), (4, 3), (2, 6), (5, 3), (1, 7), (3, 4)):
            given = t5fx.LinearizeConfig(min_tokens=0, grid=(rows, columns), suffix=0)
            fresh = trained(t5fx.linearize(packed.model(), (), call(rows, columns), config=given))
            torch.testing.assert_close(
                lin(**call(rows, columns)), fresh(**call(rows, columns)), rtol=0, atol=0
            )
    assert len(runtime.kinds) == 1


def test_positions_of_a_later_call_are_read():
    lin = converted(call(3, 4))
    again = call(3, 4)
    with torch.no_grad():
        before = lin(**again)
        again["ids"].copy_(call(4, 3)["ids"])  # in place, as a buffer that is used again
        wanted = lin(**(call(4, 3) | {n: again[n] for n in ("hidden", "text")}))
        assert not torch.equal(lin(**again), before)
        torch.testing.assert_close(lin(**again), wanted, rtol=0, atol=0)
    for ids, why in ((again["ids"].flip(0), "row by row"), (torch.zeros(12, 3), "traced")):
        with pytest.raises(RefusedCallError, match=f"grid-unknown .*{why}"):
            lin(**(again | {"ids": ids}))


def test_compiled_code_reads_positions_at_each_call():
    lin = converted(call(3, 4))
    fast = torch.compile(lin, backend="aot_eager")
    with torch.no_grad():
        for size in ((3, 4), (4, 3), (2, 6), (5, 3)):
            torch.testing.assert_close(fast(**call(*size)), lin(**call(*size)))


def test_gradients_are_those_of_the_call_that_is_computed_again():
    lin, fresh = converted(call(3, 4)), converted(call(4, 3))
    lin.checkpointed = True
    for model in (lin, fresh):
        model(**call(4, 3)).square().sum().backward()
    for (name, one), two in zip(lin.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


# --- rotary tables --------------------------------------------------------------------------------


def turned(sides, width=8):
    """A rotary table of a grid: [*sides, width]."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, sides), indexing="ij"), -1)
    return (places.sum(-1, keepdim=True) * 0.1 * torch.arange(float(width))).cos()


class Rotated(packed.Packed):
    """Packed tokens whose rotary table is made for the sides that the call says."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, hidden, height, width):
        x, rope = self.embed(hidden), self.table(height, width)
        for block in self.blocks:
            x = x + block(x, rope)
        return x


def rotated(height, width, count=None):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, count or height * width, 4, generator=generator)
    return {"hidden": hidden, "height": height, "width": width}


def flat(height, width):
    return turned((height, width)).flatten(0, 1)


def test_a_table_of_two_or_three_axes_is_the_grid():
    assert explained(Rotated(flat), rotated(3, 4)) == ((0, (3, 4), 0), "")
    video = Rotated(lambda h, w: turned((2, h, w)).flatten(0, 2))
    assert explained(video, rotated(3, 4, 24)) == ((0, (2, 3, 4), 0), "")
    one = Rotated(lambda h, w: turned((1, h, w)).flatten(0, 2))
    assert explained(one, rotated(3, 4)) == ((0, (3, 4), 0), "")


@pytest.mark.parametrize(
    "table",
    [
        lambda h, w: flat(h, w)[torch.randperm(h * w)],
        lambda h, w: turned((h * w,)),
        lambda h, w: turned((w,)).repeat(h, 1),
        lambda h, w: turned((h * w // 4, 2, 2, 1)).flatten(0, 3)[: h * w].flip(0),
        lambda h, w: turned((2, 2, 2, 2)).flatten(0, 3),
        lambda h, w: torch.cat(
            [turned((2, h // 2)).flatten(0, 1), turned((2, h // 2)).flatten(0, 1)]
        ),
    ],
)
def test_other_tables_are_none(table):
    assert explained(Rotated(table), rotated(4, 4, len(table(4, 4))))[0] == "grid-unknown"


def test_a_table_has_to_meet_queries_and_keys():
    class Block(packed.Block):
        def forward(self, x, rope):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            x = torch.nn.functional.scaled_dot_product_attention(q * rope, k, v * rope)
            return self.proj(x.transpose(1, 2).flatten(2))

    model = Rotated(flat)
    model.blocks = torch.nn.ModuleList([Block()])
    assert explained(model, rotated(3, 4))[0] == "grid-unknown"


def test_tables_that_differ_are_refused():
    class Twice(Rotated):
        def forward(self, hidden, height, width):
            x = self.embed(hidden)
            for block, rope in zip(
                self.blocks, (flat(height, width), flat(width, height)), strict=True
            ):
                x = x + block(x, rope)
            return x

    sites = t5fx.explain(Twice(None), (), rotated(3, 4), config=CONFIG).sites
    assert [site.grid for site in sites] == [(3, 4), None]
    assert "2 grids, 3 x 4 and 4 x 3" in sites[1].detail


def test_each_call_has_the_grid_of_its_table():
    torch.manual_seed(0)
    model = Rotated(flat).eval()
    lin = trained(t5fx.linearize(model, (), rotated(3, 4), config=CONFIG))
    with torch.no_grad():
        for size in ((3, 4), (4, 3), (2, 6), (5, 3)):
            fresh = trained(t5fx.linearize(model, (), rotated(*size), config=CONFIG))
            torch.testing.assert_close(lin(**rotated(*size)), fresh(**rotated(*size)))
    wrong = t5fx.LinearizeConfig(min_tokens=0, grid=(3, 4))
    with pytest.raises(NothingRewrittenError, match=r"graph shows, 0 \+ 4x3 \+ 0, got 0 \+ 3x4"):
        t5fx.linearize(model, (), rotated(4, 3), config=wrong)


def test_a_table_of_two_axes_is_not_a_batch():
    """As for a block of such a model that is compiled alone."""
    block, tokens = packed.Block(), torch.randn(2, 12, 16)
    for rope in (torch.rand(12, 8), torch.rand(1, 1, 12, 8)):
        given = t5fx.LinearizeConfig(min_tokens=0, grid=(3, 4))
        (site,) = t5fx.explain(block, (tokens, rope), config=given).sites
        assert (site.status, site.reason) == ("rewritten", None)
        (site,) = t5fx.explain(block, (tokens, rope), config=CONFIG).sites
        assert site.reason == "grid-unknown"
