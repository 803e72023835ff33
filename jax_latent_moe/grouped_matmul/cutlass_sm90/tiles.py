"""Which compiled kernel of the `cutlass` backend a problem takes: a measured one, else the one that wastes least."""

from jax_latent_moe.config import CutlassTile
from jax_latent_moe.grouped_matmul.tuning.table import Choice, measured_tile
from jax_latent_moe.native import Instance, library

SMALL_GROUP = 64
"""Mean rows per expert up to which a call is bound by reading weights."""
SMALL_TILE = 64
"""Rows of tiles for such calls: their kernels do without a counter of tiles, and gather no rows."""
FEW_ROWS = 512
"""Mean rows per expert up to which tiles run down an expert's rows before its columns.

Of 352 rows the fastest tiles of Super's products are 1.6 to 4.6 % faster so on an H100, of 1024 some are 6 % slower
(benchmarks/results/profiles/h100-2026-11-27.md). Of up to 512 an H200's table has either for half of the products.
"""


def compiled(problem) -> tuple[CutlassTile, ...]:
    """The tiles that were compiled for the problem's contraction, type and activation and hold all its experts."""
    orders = (False,) if problem.contraction == "wgrad" else (False, True)
    return tuple(_tile(instance, order) for instance in _instances(problem) for order in orders)


def refusal(problem, given: CutlassTile | None) -> str | None:
    """None, or why no compiled kernel runs the problem with the given tile, or with any."""
    tiles = compiled(problem)
    what = f"{problem.contraction} of {problem.dtype}"
    if problem.activation is not None:
        what += f" with {problem.activation.name}"
    if not tiles:
        return f"no kernel was compiled for {what} and {problem.num_experts} experts."
    if given is not None and given not in tiles:
        return f"{given!r} was not compiled for {what}; there are {', '.join(repr(tile) for tile in tiles)}."
    return None


def choose(problem) -> Choice:
    """The tile for a problem that `refusal` lets pass.

    Raises:
        ConfigError: a table of the user's holds what is no tile.
    """
    w_shape = problem.num_experts, problem.in_features, problem.out_features
    tiles = compiled(problem)
    best = min(tiles, key=lambda tile: _cost(problem, tile))
    if problem.activation is not None:
        return Choice(best, "a heuristic: tables hold no fused products")
    found = measured_tile(CutlassTile, "cutlass", problem.contraction, problem.num_rows, w_shape, problem.device_kind)
    if found is None:
        return Choice(best, "a heuristic: no table has this shape")
    if found.tile not in tiles:
        return Choice(best, f"a heuristic: this library lacks {found.tile!r} of {found.source}")
    return found


def _instances(problem) -> list[Instance]:
    name = None if problem.activation is None else problem.activation.name
    return [
        instance
        for instance in library().instances
        if (instance.dtype, instance.contraction, instance.activation) == (problem.dtype, problem.contraction, name)
        and problem.num_experts <= instance.max_experts
    ]


def _tile(instance: Instance, rows_first: bool) -> CutlassTile:
    return CutlassTile(
        instance.rows,
        instance.columns,
        instance.stages,
        instance.cluster_rows,
        instance.cluster_columns,
        rows_first,
    )


def _cost(problem, tile: CutlassTile) -> tuple[bool, float, bool]:
    """Whether it is a tile for the other kind of call; multiplied elements over wanted ones; the less likely order.

    The first of equals wins.

    In the mean of the shapes of the table it took 1 % longer than the fastest on an H100, at most 4; on an H200 2 %, at
    most 23, of weight gradients 9 (benchmarks/results/profiles/).
    """
    k, n = problem.in_features, problem.out_features
    if problem.contraction == "wgrad":
        return False, _padded(k, tile.rows * tile.cluster_rows) * _padded(n, tile.columns * tile.cluster_columns), False
    small = problem.num_rows <= SMALL_GROUP * problem.num_experts
    columns = n if problem.contraction == "fwd" else k
    few = not small and problem.num_rows <= FEW_ROWS * problem.num_experts
    padded = _padded(columns, tile.columns * tile.cluster_columns)
    return small != (tile.rows <= SMALL_TILE), padded, few != tile.rows_first


def _padded(size, tile):
    """Size in whole tiles over size."""
    return -(-size // tile) * tile / size
