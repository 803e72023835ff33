"""What a grouped-matmul backend is."""

import abc
import dataclasses
from typing import Any

from jax_latent_moe.grouped_matmul.operands import Operands, Outputs
from jax_latent_moe.grouped_matmul.problem import Epilogue, Problem


@dataclasses.dataclass(frozen=True)
class Backend(abc.ABC):
    """Computes the three contractions. Rows are sorted by expert; group_sizes counts the rows of each.

    Under jit nothing can refuse negative sizes, or sums above the rows: they are cut to the rows there are. Rows beyond
    the sum give zero rows and leak nowhere, whatever they hold. An expert without rows gets an exactly zero wgrad.
    Accumulation is in float32 (float64 for float64 operands).

    Attributes:
        config: the backend's settings, a frozen dataclass.
    """

    config: Any

    @abc.abstractmethod
    def supports(self, problem: Problem) -> str | None:
        """None when this backend runs the problem, else the reason, as a sentence."""

    @abc.abstractmethod
    def run(self, problem: Problem, tile: Any, operands: Operands) -> Outputs:
        """Runs a problem that it supports, with one of its tiles."""

    def tiles(self, problem: Problem) -> tuple[Any, ...]:
        """The tiles that `tune` times for the problem, the heuristic's first; empty where there is no choice.

        A tile is a frozen dataclass.
        """
        del problem
        return ()

    def has_tile(self, problem: Problem, tile: Any) -> bool:
        """Whether a kernel runs the problem with a tile that a table names."""
        return tile in self.tiles(problem)

    def given_tile(self, problem: Problem) -> Any:
        """The tile that the config names for the problem, or None."""
        del problem

    def tile_type(self, problem: Problem) -> type | None:
        """The dataclass of the problem's tiles, which tables of measured tiles are read into; None without tiles."""
        del problem

    def in_place(self, problem: Problem, tile: Any) -> tuple[str, ...]:
        """Operands ("lhs", "rhs") that are not dense and that the kernel reads in place; others are made dense."""
        del problem, tile
        return ()

    def insists(self, epilogue: Epilogue) -> bool:
        """Whether an epilogue that `supports` refuses is an error, rather than left to XLA."""
        del epilogue
        return False
