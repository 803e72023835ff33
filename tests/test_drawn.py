"""The drawn part of a grid has the right number of cells, in the grid's order, with each value of each column."""

import itertools

import pytest

from tests import drawn, seeds


@pytest.mark.parametrize(
    ("columns", "number"), [(("abcdefgh", "xy", "uv"), 8), (("ab", "xy"), 2), (("ab", "xyz"), 3), ((range(4),), 2)]
)
def test_each_value_occurs(monkeypatch, columns, number):
    monkeypatch.setattr(drawn, "WHOLE", False)
    grid, draws = list(itertools.product(*columns)), set()
    for seed in range(80):
        monkeypatch.setenv(seeds.VARIABLE, str(seed))
        rows = drawn.drawn(grid, number)
        assert rows == [row for row in grid if row in rows]
        assert len(rows) == number
        assert [len(set(column)) for column in zip(*rows, strict=True)] == [min(len(c), number) for c in columns]
        draws.add(tuple(rows))
    assert len(draws) > 1, "every seed draws the same"
    assert {row for rows in draws for row in rows} == set(grid)


def test_the_whole_grid(monkeypatch):
    monkeypatch.setattr(drawn, "WHOLE", True)
    assert drawn.drawn(zip("ab"), 1) == [("a",), ("b",)]
