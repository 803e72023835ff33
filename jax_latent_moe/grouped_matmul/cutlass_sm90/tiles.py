"""The compiled kernels of the `cutlass` backend that can run a problem, ordered by a heuristic."""

import re

from jax_latent_moe.formats.fp8 import BLOCK
from jax_latent_moe.grouped_matmul.cutlass_sm90 import widened
from jax_latent_moe.grouped_matmul.cutlass_sm90.config import CutlassTile
from jax_latent_moe.grouped_matmul.problem import Problem
from jax_latent_moe.grouped_matmul.sm90 import FP8, kernel_activation, library

SMALL_GROUP = 48
"""A call with at most this many rows per expert, on average, is bound by reading weights, and takes tiles of 64 rows.

Groups differ in size. At 50 rows on average, many experts have more than 64, and two such tiles read their weights.
"""
SMALL_TILE = 64
"""Rows of the tiles for such calls. Their kernels have no counter of tiles and gather no rows."""
FEW_ROWS = range(33, 513)
"""With so many rows per expert, on average, tiles go through an expert's rows before its columns.

At 352 rows this order makes the fastest tiles of Super's products 1.6 to 4.6 % faster on an H100. At 1024 rows it makes
some 6 % slower (benchmarks/results/profiles/h100-2026-11-27.md). On an H200, up to 512 rows, each order is the faster
one for half of the products.
"""
FEW_TILES = 210
"""With at most this many tiles of 128 x 128, twice as many tiles of 64 rows keep more of the 132 SMs busy."""
SQUARE = 1.2
"""How much longer a plain product takes in tiles of 128 x 128, which load 1.2 times as many elements for each product.

A tile with more rows gains nothing where experts have at most 128 rows on average, so this does not count there.
"""
NARROW = 64
"""Up to this many columns, such as the rank of adapters, a tile of 64 columns takes fewer products with padding."""
SHALLOW = 512
"""Up to this many contracted elements, SQUARE counts for tiles of 192 x 128 as well.

They take as long as 128 x 128 there, and in the median 8 % longer than 128 x 192. Storing a tile weighs more in such a
product, compared with loading its operands, and the swap-AB epilogue of tiles of 128 columns transposes.
"""
THREE_WARPGROUPS = 1.05
"""How much longer many rows of FP8 take in other tiles than those of 192 rows, which three warpgroups share.

Measured at 1408 and 4096 rows per expert; at 352 neither tile wins. The bound between them, the end of FEW_ROWS, is a
guess. With relu2's gradient the tiles of 192 rows win at 352 rows too (benchmarks/results/profiles/h200-2026-11-30.md).
"""
TWO_WARPGROUPS = 1.1
"""How much longer a weight in codes takes in tiles of 256 x 128 than in 192 x 192, which three warpgroups share.

Measured with Super's first product at 11 and 44 rows per expert: 1.09 to 1.17. At 176 and 352 rows it is 0.98 to 1.09.
The second product has 1024 columns, which six tiles of 192 pad to 1152. It takes 0.94 to 1.01 times as long in tiles of
256 x 128 (benchmarks/results/profiles/h200-2026-11-30.md).
"""
# The other numbers were fitted to 40 random shapes on an H200 (benchmarks/results/profiles/h200-2026-11-29.md).
FORMATS = {"bfloat16": "bf16", "float16": "f16"} | dict.fromkeys(FP8, "e4m3")
_TILE = re.compile(r"(\d+)x(\d+)x(\d+)\.(\d+)x(\d+)")


def kernel_name(problem: Problem, tile: CutlassTile) -> str:
    """The name of the compiled kernel: sm90.CONTRACTION.FORMAT[.ACTIVATION:RESIDUAL].TILE.CLUSTER.

    A kernel that keeps a residual can also run without keeping it.
    """
    return next(name for name, found in _kernels(problem) if found == _shape(tile))


def tiles(problem: Problem) -> tuple[CutlassTile, ...]:
    """The tiles that were compiled for the problem's contraction, format and epilogue, sorted by `_cost`."""
    orders = (False,) if problem.contraction == "wgrad" else (False, True)
    compiled = [CutlassTile(*shape, rows_first=order) for _, shape in _kernels(problem) for order in orders]
    return tuple(sorted(compiled, key=lambda tile: _cost(problem, tile)))


def refusal(problem: Problem, given: CutlassTile | None) -> str | None:
    """None, or the reason why no compiled kernel runs the problem with the given tile, or with any tile."""
    found = tiles(problem)
    what = f"{problem.contraction} of {problem.lhs.format}"
    if widened.widens(problem):
        what += f" and {problem.rhs.format}"
    if problem.epilogue is not None:
        what += f" with {problem.epilogue}"
    if not found:
        return f"no kernel was compiled for {what} and {problem.num_experts} experts."
    if given is not None and given not in found:
        return f"{given!r} was not compiled for {what}; these were: {', '.join(repr(tile) for tile in found)}."
    return None


def _kernels(problem) -> list[tuple[str, tuple[int, int, int, int, int]]]:
    """(name, tile) of the compiled kernels that can run the problem, in the library's order."""
    format = widened.FORMAT if widened.widens(problem) else FORMATS[problem.lhs.format]
    prefix = f"sm90.{problem.contraction}.{format}."
    if problem.epilogue is not None:
        activation = kernel_activation(problem.epilogue.activation)
        assert activation is not None, "fuse_refusal refuses an activation that the epilogues do not have"
        prefix += f"{activation.name}:"
        if problem.epilogue.residual is not None:
            prefix += f"{problem.epilogue.residual}."
    found = []
    for name, max_experts in library(problem.device).kernels.items():
        tile = _TILE.fullmatch(".".join(name.split(".")[-2:]))
        plain = name.count(".") == 4
        if name.startswith(prefix) and plain == (problem.epilogue is None) and problem.num_experts <= max_experts:
            assert tile is not None, f"{name} does not end in TILE.CLUSTER"
            rows, columns, stages, cluster_rows, cluster_columns = map(int, tile.groups())
            if _encoded_columns(problem) in (None, columns):
                found.append((name, (rows, columns, stages, cluster_rows, cluster_columns)))
    return found


def _encoded_columns(problem) -> int | None:
    """The columns of a tile that encodes: a block that shares a scale, or its gates and its up half."""
    if problem.epilogue is None or problem.epilogue.encodes is None:
        return None
    return BLOCK * (2 if problem.epilogue.activation.gated else 1)


def _shape(tile) -> tuple[int, ...]:
    return tile.rows, tile.columns, tile.stages, tile.cluster_rows, tile.cluster_columns


def _cost(problem, tile: CutlassTile) -> tuple[bool, bool, float, bool]:
    """The sort key of a tile.

    It says whether the tile is for the other kind of call, whether it is for other widths, its relative time, and
    whether its order is the unlikely one.

    The first of equal tiles wins. In a later run of the 40 shapes that it was fitted to, the chosen tile took at most
    4 % longer than the fastest in 90 % of 120 products, and more than 12 % longer in one
    (benchmarks/results/profiles/h200-2026-11-30.md).
    """
    k, n = problem.k, problem.n
    plain = problem.epilogue is None and problem.lhs.format not in FP8 and not widened.widens(problem)
    square = tile.rows == tile.columns
    if problem.contraction == "wgrad":
        padded = _padded(k, tile.rows * tile.cluster_rows) * _padded(n, tile.columns * tile.cluster_columns)
        return False, False, SQUARE * padded if plain and square else padded, False
    columns, depth = (n, k) if problem.contraction == "fwd" else (k, n)
    rows = -(-problem.planned_rows // problem.num_experts)
    few_tiles = plain and problem.lhs.layout != "gathered"
    few_tiles = few_tiles and problem.num_experts * -(-rows // 128) * -(-columns // 128) <= FEW_TILES
    small = rows <= SMALL_GROUP or few_tiles
    slower = plain and rows > 128 and (square or (depth <= SHALLOW and tile.columns == 128))
    padded = _padded(columns, tile.columns * tile.cluster_columns)
    many = rows > 128 if problem.contraction == "dgrad" else rows >= FEW_ROWS.stop
    if problem.lhs.format in FP8 and many and tile.rows != 192:
        padded *= THREE_WARPGROUPS
    if widened.widens(problem) and tile.rows != 192:
        padded *= TWO_WARPGROUPS
    return (
        small != (tile.rows <= SMALL_TILE),
        (columns <= NARROW) != (tile.columns <= NARROW),
        SQUARE * padded if slower else padded,
        (rows in FEW_ROWS) != tile.rows_first,
    )


def _padded(size, tile):
    """The size rounded up to whole tiles, divided by the size."""
    return -(-size // tile) * tile / size
