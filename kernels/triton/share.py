"""How tiles of tokens are shared out among programs.

A GPU runs a launch in rounds: as many programs at a time as are resident, its slots, then as many
again. Each program of ``groups`` (those of a batch item, a head and, in some kernels, a block of
hidden units) goes through a chunk of the group's tiles, so that a launch takes about rounds x chunk
times as long as a tile. Programs too many by one cost a whole round.
"""

import functools
from typing import Any

import torch

#: Chunks are tried that end after the fewest rounds there can be, one more, and so on: so many.
ROUNDS = 8
#: Tiles that a size is taken for of which nothing is known while a compiler traces.
USUAL = 64


def ceil_div(a: Any, b: Any) -> Any:
    """a / b rounded up, of integers that may be symbolic. Triton's own takes a microsecond."""
    return -(-a // b)


def best_chunk(tiles: Any, groups: Any, slots: int) -> Any:
    """Tiles of a program that minimise rounds x chunk; of equal ones the most, for each program
    has weights to load, and sums to write that another kernel reads.

    Where sizes are symbolic it is the number of rounds that is chosen, for the sizes that the
    compiler traces with, and the chunk follows from it at all sizes: no comparison is recorded,
    and of other sizes a third is lost at most, 2 % on the average. Expressions with a minimum over
    rounds take Inductor minutes.
    """
    if type(tiles) is int and type(groups) is int:
        return _known_chunk(tiles, groups, slots)
    rounds = best_rounds(_example(tiles, USUAL), _example(groups, slots), slots)
    return _chunk(tiles, groups, slots, rounds)


def _chunk(tiles: Any, groups: Any, slots: int, rounds: int) -> Any:
    """The fewest tiles for which so many rounds are enough."""
    return ceil_div(tiles, torch.sym_max(1, rounds * slots // groups))


def best_rounds(tiles: int, groups: int, slots: int) -> int:
    """After which the launch with the best chunk ends, or a few more: then it ends sooner."""
    fewest = ceil_div(groups, slots)
    tried = range(fewest, fewest + ROUNDS)
    return min(tried, key=lambda rounds: rounds * _chunk(tiles, groups, slots, rounds))


#: What is found is kept: it depends on nothing but these integers.
@functools.lru_cache(maxsize=4096)
def _known_chunk(tiles: int, groups: int, slots: int) -> int:
    chunk: int = _chunk(tiles, groups, slots, best_rounds(tiles, groups, slots))
    return chunk


def _example(size: Any, otherwise: int) -> int:
    """The size that a compiler traces with."""
    if isinstance(size, torch.SymInt):
        size = size.node.hint
    return otherwise if size is None else int(size)
