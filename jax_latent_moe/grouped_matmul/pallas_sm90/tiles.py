"""The tiles of the Pallas kernels for a shape, the one that pads least first."""

import dataclasses
import math

from jax_latent_moe.formats import FORMATS
from jax_latent_moe.grouped_matmul.pallas_sm90.config import (
    SHARED_MEMORY,
    PallasFp8Tile,
    PallasMatmulTile,
    PallasWgradTile,
    PallasWidenTile,
)
from jax_latent_moe.grouped_matmul.pallas_sm90.widening import WIDENINGS, Widening, aligned_lines
from jax_latent_moe.grouped_matmul.pallas_sm90.words import STEP
from jax_latent_moe.grouped_matmul.problem import Problem

SMALL_GROUP = 64
"""A call with at most this many rows per expert, on average, is bound by reading weights."""

# The fastest on wide shapes comes first. The factor is a tile's measured cost, relative to the first, at equal padding.
_MATMUL_TILES = (
    (1.0, PallasMatmulTile(rows=128, columns=192, stages=4, store_buffers=2, cluster=2)),
    (1.0, PallasMatmulTile(rows=128, columns=128, stages=5, store_buffers=2, cluster=2)),
    (1.1, PallasMatmulTile(rows=128, columns=64, stages=7, store_buffers=1, cluster=1)),
)
_SMALL_MATMUL_TILES = (
    (1.0, PallasMatmulTile(rows=64, columns=192, stages=6, store_buffers=1, cluster=1)),
    (1.0, PallasMatmulTile(rows=64, columns=128, stages=8, store_buffers=1, cluster=1)),
)
_WGRAD_TILES = (
    (1.0, PallasWgradTile(rows=128, columns=192, stages=4, store_buffers=2, cluster=2)),
    (1.06, PallasWgradTile(rows=192, columns=128, stages=4, store_buffers=1, cluster=2)),
    (1.15, PallasWgradTile(rows=128, columns=128, stages=5, store_buffers=2, cluster=2)),
    (1.5, PallasWgradTile(rows=64, columns=64, stages=8, store_buffers=2, cluster=1)),
)
# Tables hold no products with an epilogue. A gradient, or a tile of gate and up columns, uses two or three buffers of
# 64 columns at once. The activation also needs registers, so the accumulators are smaller.
_ACTIVATION_TILES = (
    (1.0, PallasMatmulTile(rows=128, columns=192, stages=4, store_buffers=2, cluster=2)),
    (1.0, PallasMatmulTile(rows=128, columns=128, stages=4, store_buffers=3, cluster=2)),
)
_SMALL_ACTIVATION_TILES = (
    (1.0, PallasMatmulTile(rows=64, columns=192, stages=6, store_buffers=2, cluster=1)),
    (1.0, PallasMatmulTile(rows=64, columns=128, stages=7, store_buffers=3, cluster=1)),
)
_THREE_BUFFER_TILES = (
    (1.0, PallasMatmulTile(rows=128, columns=128, stages=4, store_buffers=3, cluster=2)),
    (1.0, PallasMatmulTile(rows=128, columns=128, stages=4, store_buffers=3, cluster=1)),
)
_SMALL_THREE_BUFFER_TILES = ((1.0, PallasMatmulTile(rows=64, columns=128, stages=7, store_buffers=3, cluster=1)),)
# On an H200 the first FP8 tile was the fastest for Super's up-product (benchmarks/results/). Gated tiles, which hold
# gate and up columns, have not been measured.
_FP8_TILES = (
    (1.0, PallasFp8Tile(rows=128, columns=192, stages=4, store_buffers=2, band=4, cluster=2)),
    (1.0, PallasFp8Tile(rows=128, columns=128, stages=5, store_buffers=2, band=4, cluster=2)),
)
_SMALL_FP8_TILES = (
    (1.0, PallasFp8Tile(rows=64, columns=256, stages=4, store_buffers=2)),
    (1.0, PallasFp8Tile(rows=64, columns=128, stages=8, store_buffers=2)),
)
_GATED_FP8_TILES = ((1.0, PallasFp8Tile(rows=128, columns=128, stages=5, store_buffers=3, cluster=2)),)
_SMALL_GATED_FP8_TILES = ((1.0, PallasFp8Tile(rows=64, columns=256, stages=4, store_buffers=3)),)
_FP8_SHAPES = ((128, 192, 4, 2), (128, 128, 5, 2), (128, 64, 7, 2), (64, 384, 3, 2), (64, 256, 4, 2), (64, 128, 8, 2))
# (rows, columns, stages, store_buffers) for `tune`, with as many stages as shared memory allows.
_SHAPES = (
    (128, 192, 4, 2),
    (128, 128, 5, 2),
    (192, 128, 4, 1),
    (128, 64, 7, 1),
    (64, 256, 5, 1),
    (64, 192, 6, 1),
    (64, 128, 8, 1),
    (64, 64, 8, 2),
)
# (rows per expert at most, rows of a tile) for tiles that widen codes, which have not been measured. A group may begin
# 7 rows into its tile. Padding rows cost nothing as long as reading the codes takes longer.
_WIDEN_ROWS = ((4, 16), (16, 32), (48, 64), (math.inf, 128))
_MOST_STAGES, _LEAST_STAGES = 12, 3


def tiles(problem: Problem) -> tuple[PallasMatmulTile | PallasWgradTile | PallasFp8Tile | PallasWidenTile, ...]:
    """The tiles of a problem: first the one that pads least, then all others for `tune` to time.

    A product with an activation in its epilogue has only the first.
    """
    if problem.rhs.format in WIDENINGS and problem.lhs.format not in FORMATS:
        return widen_tiles(problem)
    best = _least_padding(problem)
    if problem.epilogue is not None:
        return (best,)
    if problem.contraction == "wgrad":
        others = [PallasWgradTile(*shape, cluster=cluster) for shape in _SHAPES for cluster in (1, 2)]
    else:
        tile, shapes = (PallasFp8Tile, _FP8_SHAPES) if isinstance(best, PallasFp8Tile) else (PallasMatmulTile, _SHAPES)
        others = [tile(*shape, band=band, cluster=cluster) for shape in shapes for cluster in (1, 2) for band in (1, 4)]
    return tuple(dict.fromkeys((best, *others)))


def widen_tile_fits(tile: PallasWidenTile, problem: Problem) -> bool:
    """Whether the tile's buffers, with the scales of K, fit the shared memory."""
    return widen_bytes(tile, WIDENINGS[problem.rhs.format], problem.k) <= SHARED_MEMORY


def widen_bytes(tile: PallasWidenTile, how: Widening, k: int) -> int:
    """Bytes of shared memory that a tile takes, without barriers."""
    stage = tile.features * how.step_bytes() + 2 * STEP * tile.rows
    scales = tile.features * sum(aligned_lines(how, k).values())
    stores = 2 * 2 * 64 * tile.rows * tile.store_buffers  # 64 columns of 16 bits for each of two consumers
    return tile.stages * stage + tile.scale_buffers * scales + stores


def widen_tiles(problem: Problem) -> tuple[PallasWidenTile, ...]:
    """The heuristic's tile, then all others, with as many stages as shared memory allows."""
    mean = problem.num_rows / max(problem.num_experts, 1)
    best = next(rows for most, rows in _WIDEN_ROWS if mean <= most)
    shapes = [(128, best), *((128, rows) for rows in (8, 16, 32, 64, 128, 192)), (256, 32), (256, 64)]
    found = []
    for shape in dict.fromkeys(shapes):
        for stages in range(_MOST_STAGES, _LEAST_STAGES - 1, -1):
            tile = PallasWidenTile(*shape, stages=stages)
            if widen_tile_fits(tile, problem):
                found += [tile, dataclasses.replace(tile, band=4)]
                break
    return tuple(found)


def _least_padding(problem):
    if problem.contraction == "wgrad":

        def cost(choice):
            factor, tile = choice
            return factor * _padded(problem.k, tile.rows * tile.cluster) * _padded(problem.n, tile.columns)

        return min(_WGRAD_TILES, key=cost)[1]
    columns = problem.n if problem.contraction == "fwd" else problem.k
    small = problem.num_rows <= SMALL_GROUP * problem.num_experts
    return min(
        _matmul_tiles(problem, small),
        key=lambda choice: choice[0] * _padded(columns, choice[1].columns * choice[1].cluster),
    )[1]


def _matmul_tiles(problem, small):
    epilogue = problem.epilogue
    if problem.lhs.format in FORMATS:
        if epilogue is not None and epilogue.activation.gated:
            return _SMALL_GATED_FP8_TILES if small else _GATED_FP8_TILES
        return _SMALL_FP8_TILES if small else _FP8_TILES
    if epilogue is None:
        return _SMALL_MATMUL_TILES if small else _MATMUL_TILES
    if problem.contraction == "fwd" and not epilogue.activation.gated:
        return _SMALL_ACTIVATION_TILES if small else _ACTIVATION_TILES
    return _SMALL_THREE_BUFFER_TILES if small else _THREE_BUFFER_TILES


def _padded(size, tile):
    """The size rounded up to whole tiles, divided by the size."""
    return -(-size // tile) * tile / size
