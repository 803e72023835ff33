"""Draws a part of a long grid: a new part in each run, and the same part in every worker of xdist."""

import collections
import os
from collections.abc import Iterable

from tests import seeds

WHOLE = "JAX_LATENT_MOE_WHOLE_MATRIX" in os.environ
"""With this variable every grid runs whole."""


def drawn(grid: Iterable[tuple], number: int) -> list[tuple]:
    """The given number of rows of the grid, in its order. Each value of each column occurs if the number allows it.

    The draw depends only on the run's seed. Values are hashable.
    """
    grid = list(grid)
    if WHOLE or number >= len(grid):
        return grid
    left = seeds.generator("drawn", len(grid), number).permutation(len(grid)).tolist()
    seen, chosen = collections.Counter(), []

    def rank(i: int) -> tuple[int, int]:
        """Rows with the most missing values come first, and among these the one whose values are rarest."""
        counts = [seen[value] for value in enumerate(grid[i])]
        return -counts.count(0), sum(counts)

    while len(chosen) < number:
        best = min(left, key=rank)
        left.remove(best)
        chosen.append(best)
        seen.update(enumerate(grid[best]))
    return [grid[i] for i in sorted(chosen)]
