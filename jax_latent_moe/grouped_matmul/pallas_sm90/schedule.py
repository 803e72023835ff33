"""The rows of each tile of the Pallas kernels, computed on the device from group_sizes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jax_latent_moe.grouped_matmul.groups import group_ends

# TMA reads rows in swizzled blocks of 8. A tile starts at a multiple of 8, up to 7 rows before its expert's first row.
ROW_ALIGNMENT = 8


class RowTiles(NamedTuple):
    """Tiles of rows in the order of the experts, then tiles of the padding rows.

    Attributes:
        table: [4, T] int32: expert, first row (a multiple of 8), and begin and end of the tile's own rows, counted from
            that first row. T is a static bound.
        counts: [2] int32: the number of tiles with an expert, and of all tiles.
    """

    table: Int[Array, "4 t"]
    counts: Int[Array, " 2"]


def group_bounds(group_sizes: Int[Array, " e"], num_rows: int) -> tuple[Int[Array, " e"], Int[Array, " e"]]:
    """First row and end of each group. A negative size counts as 0, and groups are cut at the last row."""
    experts = group_sizes.shape[0]
    if experts * num_rows >= 2**31:
        ends = group_ends(group_sizes, num_rows)
        return jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends
    sizes = jnp.clip(group_sizes.astype(jnp.int32), 0, num_rows)
    # XLA compiles a masked sum to one fused kernel, a cumulative sum to several.
    index = jnp.arange(experts, dtype=jnp.int32)
    ends = jnp.sum(jnp.where(index[:, None] >= index[None, :], sizes[None, :], 0), axis=1, dtype=jnp.int32)
    return jnp.minimum(ends - sizes, num_rows), jnp.minimum(ends, num_rows)


def row_tiles(group_sizes: Int[Array, " e"], num_rows: int, tile_rows: int) -> RowTiles:
    """Cuts rows into tiles of at most tile_rows rows of one expert. Experts without rows have no tile."""
    experts = group_sizes.shape[0]
    starts, ends = group_bounds(group_sizes, num_rows)
    # The padding rows form one more group: their output is zero.
    starts = jnp.concatenate([starts, ends[-1:]])
    ends = jnp.concatenate([ends, jnp.full((1,), num_rows, jnp.int32)])
    first = starts - starts % ROW_ALIGNMENT
    tiles = jnp.where(ends > starts, -((first - ends) // tile_rows), 0)
    index = jnp.arange(experts + 1, dtype=jnp.int32)
    last = jnp.sum(jnp.where(index[:, None] >= index[None, :], tiles[None, :], 0), axis=1, dtype=jnp.int32)
    tile = jnp.arange(max_row_tiles(experts, num_rows, tile_rows), dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(last[None, :] <= tile[:, None], axis=1, dtype=jnp.int32), experts)
    row = first[group] + (tile - last[group] + tiles[group]) * tile_rows
    begin = jnp.clip(starts[group] - row, 0, tile_rows)
    end = jnp.clip(ends[group] - row, 0, tile_rows)
    return RowTiles(jnp.stack([jnp.minimum(group, experts - 1), row, begin, end]), last[-2:])


def max_row_tiles(experts: int, num_rows: int, tile_rows: int) -> int:
    """An upper bound of the number of tiles, for all group sizes that add up to at most num_rows."""
    groups = min(experts + 1, num_rows)
    return (num_rows + groups * (ROW_ALIGNMENT - 1 + tile_rows - 1)) // tile_rows


def in_bands(index, band: int, num_row_tiles, num_column_tiles: int):
    """Row tile and column tile of a tile. Tiles go by bands of row tiles, column by column in each band.

    Args:
        index: of the tile.
        band: row tiles of a band.
        num_row_tiles: number of row tiles, on the device.
        num_column_tiles: number of column tiles.
    """
    first = lax.div(index, band * num_column_tiles)
    within = index - first * (band * num_column_tiles)
    height = jnp.minimum(num_row_tiles - first * band, band)
    column = lax.div(within, height)
    return first * band + within - column * height, column
