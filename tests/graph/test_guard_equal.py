"""Guards that sizes are equal which the captured example has equal."""

import pytest
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from t5fx.graph.sizes import expr, guard_equal, same


def symbols(*values):
    """A dynamic size for each value, none known to equal another."""
    env = ShapeEnv()
    made = []
    for i, value in enumerate(values):
        # In another order of the names than they are made in.
        source = ConstantSource(f"size{9 - i}")
        symbol = env.create_symbol(value, source, DimDynamic.DYNAMIC)
        made.append(env.create_symintnode(symbol, hint=value, source=source))
    return made


@pytest.mark.parametrize("sides", [(8, 12), (12, 8), (8, 8)])
def test_sizes_that_are_computed_alike_have_equal_sides(sides):
    height, width, other_height, other_width = symbols(*sides, *sides)
    guard_equal([(height // 2) * (width // 2), (other_height // 2) * (other_width // 2)])
    assert same(expr(height), expr(other_height)) and same(expr(width), expr(other_width))
    assert not same(expr(height), expr(width))


def test_sizes_that_differ_in_the_example_are_not_guarded():
    one, other = symbols(8, 12)
    guard_equal([one * 2, other * 2])
    assert not one.node.shape_env.guards


def test_a_size_and_a_number():
    (one,) = symbols(8)
    guard_equal([one, 8])
    assert expr(one) == 8
