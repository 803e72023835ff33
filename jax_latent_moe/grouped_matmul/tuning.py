"""Tiles of the Pallas kernels: measured ones from a table, else the one that pads least."""

import functools
import importlib.resources
import json

from jax_latent_moe.config import PallasMatmulTile, PallasOuterTile

SMALL_GROUP = 64
"""Mean rows per expert up to which a call is bound by reading weights."""

# Fastest first on wide shapes; the factor is the measured cost of the others at equal padding.
_MATMUL_TILES = (
    (1.0, PallasMatmulTile(rows=128, columns=192, stages=4, out_slots=2, cluster=2)),
    (1.0, PallasMatmulTile(rows=128, columns=128, stages=5, out_slots=2, cluster=2)),
    (1.1, PallasMatmulTile(rows=128, columns=64, stages=7, out_slots=1, cluster=1)),
)
_SMALL_MATMUL_TILES = (
    (1.0, PallasMatmulTile(rows=64, columns=192, stages=6, out_slots=1, cluster=1)),
    (1.0, PallasMatmulTile(rows=64, columns=128, stages=8, out_slots=1, cluster=1)),
)
_OUTER_TILES = (
    (1.0, PallasOuterTile(rows=128, columns=192, stages=4, out_slots=2, cluster=2)),
    (1.06, PallasOuterTile(rows=192, columns=128, stages=4, out_slots=1, cluster=2)),
    (1.15, PallasOuterTile(rows=128, columns=128, stages=5, out_slots=2, cluster=2)),
    (1.5, PallasOuterTile(rows=64, columns=64, stages=8, out_slots=2, cluster=1)),
)


def matmul_tile(num_rows: int, w_shape: tuple[int, int, int], transpose_w: bool) -> PallasMatmulTile:
    """The tile for rows[num_rows, .] x w of shape [E, K, N], or x w^T."""
    contraction, columns = ("rows_wt", w_shape[1]) if transpose_w else ("rows_w", w_shape[2])
    if entry := _measured(contraction, num_rows, w_shape):
        return PallasMatmulTile(**entry["tile"])
    tiles = _SMALL_MATMUL_TILES if num_rows <= SMALL_GROUP * w_shape[0] else _MATMUL_TILES
    return min(tiles, key=lambda choice: choice[0] * _padded(columns, choice[1].columns * choice[1].cluster))[1]


def outer_tile(num_rows: int, w_shape: tuple[int, int, int]) -> PallasOuterTile:
    """The tile for the products rows^T x rows that make a [E, K, N]."""
    if entry := _measured("outer", num_rows, w_shape):
        return PallasOuterTile(**entry["tile"])

    def cost(choice):
        factor, tile = choice
        return factor * _padded(w_shape[1], tile.rows * tile.cluster) * _padded(w_shape[2], tile.columns)

    return min(_OUTER_TILES, key=cost)[1]


def _padded(size, tile):
    """Size in whole tiles over size."""
    return -(-size // tile) * tile / size


def _measured(contraction, num_rows, w_shape) -> dict | None:
    """The table's entry for the same weights and at most twice or half the rows, the nearest first."""
    near = [
        entry
        for entry in _table()
        if (entry["contraction"], *entry["w_shape"]) == (contraction, *w_shape)
        and entry["num_rows"] <= 2 * num_rows <= 4 * entry["num_rows"]
    ]
    return min(near, key=lambda entry: abs(entry["num_rows"] - num_rows), default=None)


@functools.cache
def _table() -> list[dict]:
    return json.loads(importlib.resources.files(__package__).joinpath("tuning_hopper.json").read_text())
