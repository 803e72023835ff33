"""The interface of a grouped-matmul backend."""

import abc
import dataclasses
from typing import Any, ClassVar

from jax_latent_moe.grouped_matmul.operands import Operands, Outputs
from jax_latent_moe.grouped_matmul.problem import Epilogue, Problem


@dataclasses.dataclass(frozen=True)
class Backend(abc.ABC):
    """Computes the three contractions. Rows are sorted by expert, and group_sizes counts the rows of each expert.

    Group sizes cannot be checked under jit: a negative size counts as 0, and groups are cut at the last row. Padding
    rows, those beyond the sum, give zero rows and affect no other value, whatever they hold. An expert without rows
    gets an exactly zero wgrad. Accumulation is in float32 (float64 for float64 operands).

    Attributes:
        config: the backend's settings, a frozen dataclass.
        fuses_one_group: whether its fused kernels run the shared expert, which is one group of all tokens. XLA does
            otherwise.
    """

    config: Any
    fuses_one_group: ClassVar[bool] = False

    @abc.abstractmethod
    def supports(self, problem: Problem) -> str | None:
        """None if this backend runs the problem, else the reason why not, as a sentence."""

    @abc.abstractmethod
    def run(self, problem: Problem, tile: Any, operands: Operands) -> Outputs:
        """Runs a supported problem with one of its tiles."""

    def tiles(self, problem: Problem) -> tuple[Any, ...]:
        """The tiles that `tune` times for the problem, best first by the heuristic; empty if there is no choice.

        A tile is a frozen dataclass.
        """
        del problem
        return ()

    def has_tile(self, problem: Problem, tile: Any) -> bool:
        """Whether a kernel runs the problem with this tile, which a table names."""
        return tile in self.tiles(problem)

    def given_tile(self, problem: Problem) -> Any:
        """The tile that the config names for the problem, or None."""
        del problem

    def tile_type(self, problem: Problem) -> type | None:
        """The dataclass of the problem's tiles, into which tables of measured tiles are read; None without tiles."""
        del problem

    def in_place(self, problem: Problem, tile: Any) -> tuple[str, ...]:
        """The operands ("lhs", "rhs") that are not dense and that the kernel reads without a dense copy."""
        del problem, tile
        return ()

    def insists(self, epilogue: Epilogue) -> bool:
        """Whether it is an error if `supports` refuses the epilogue. Otherwise the epilogue is left to XLA."""
        del epilogue
        return False
