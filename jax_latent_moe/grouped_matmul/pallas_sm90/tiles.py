"""Which tile the Pallas kernels take for a shape: a measured one, else the one that pads least."""

from collections.abc import Sequence

from jax_latent_moe.config import PallasBackend, PallasMatmulTile, PallasWgradTile
from jax_latent_moe.grouped_matmul.fused import FusedActivation
from jax_latent_moe.grouped_matmul.tuning.table import Choice, measured_tile

SMALL_GROUP = 64
"""Mean rows per expert up to which a call is bound by reading weights."""

# Fastest first on wide shapes; the factor is the measured cost of the others at equal padding.
_MATMUL_TILES = (
    (1.0, PallasMatmulTile(rows=128, columns=192, stages=4, store_buffers=2, cluster=2)),
    (1.0, PallasMatmulTile(rows=128, columns=128, stages=5, store_buffers=2, cluster=2)),
    (1.1, PallasMatmulTile(rows=128, columns=64, stages=7, store_buffers=1, cluster=1)),
)
_SMALL_MATMUL_TILES = (
    (1.0, PallasMatmulTile(rows=64, columns=192, stages=6, store_buffers=1, cluster=1)),
    (1.0, PallasMatmulTile(rows=64, columns=128, stages=8, store_buffers=1, cluster=1)),
)
_OUTER_TILES = (
    (1.0, PallasWgradTile(rows=128, columns=192, stages=4, store_buffers=2, cluster=2)),
    (1.06, PallasWgradTile(rows=192, columns=128, stages=4, store_buffers=1, cluster=2)),
    (1.15, PallasWgradTile(rows=128, columns=128, stages=5, store_buffers=2, cluster=2)),
    (1.5, PallasWgradTile(rows=64, columns=64, stages=8, store_buffers=2, cluster=1)),
)
# Of fused products no table holds any. With a gradient, and where a tile is half gate and half up columns, two or three
# slots of 64 columns are at work at once, and what the accumulator leaves of the registers goes to the activation.
_ACTIVATION_TILES = (
    (1.0, PallasMatmulTile(rows=128, columns=192, stages=4, store_buffers=2, cluster=2)),
    (1.0, PallasMatmulTile(rows=128, columns=128, stages=4, store_buffers=3, cluster=2)),
)
_SMALL_ACTIVATION_TILES = (
    (1.0, PallasMatmulTile(rows=64, columns=192, stages=6, store_buffers=2, cluster=1)),
    (1.0, PallasMatmulTile(rows=64, columns=128, stages=7, store_buffers=3, cluster=1)),
)
_THREE_SLOT_TILES = (
    (1.0, PallasMatmulTile(rows=128, columns=128, stages=4, store_buffers=3, cluster=2)),
    (1.0, PallasMatmulTile(rows=128, columns=128, stages=4, store_buffers=3, cluster=1)),
)
_SMALL_THREE_SLOT_TILES = ((1.0, PallasMatmulTile(rows=64, columns=128, stages=7, store_buffers=3, cluster=1)),)
# (rows, columns, stages, store_buffers) as large as shared memory allows, for `tune`.
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


def choose(contraction: str, num_rows: int, w_shape: Sequence[int], device: str) -> Choice:
    """The tile for rows[num_rows, .] and weights, or their gradient, of shape [E, K, N].

    Raises:
        ConfigError: a table of the user's holds a tile that no kernel could run.
    """
    tile_type = PallasWgradTile if contraction == "wgrad" else PallasMatmulTile
    if found := measured_tile(tile_type, "pallas", contraction, num_rows, w_shape, device):
        return found
    return Choice(_least_padding(contraction, num_rows, w_shape), "a heuristic: no table has this shape")


def choose_fused(
    contraction: str, num_rows: int, w_shape: Sequence[int], activation: FusedActivation
) -> PallasMatmulTile:
    """The tile for a product with an activation, or its gradient, in the epilogue: the one that pads least."""
    columns, small = w_shape[1], num_rows <= SMALL_GROUP * w_shape[0]
    tiles = _SMALL_THREE_SLOT_TILES if small else _THREE_SLOT_TILES
    if contraction == "fwd":
        columns = w_shape[2]
        if not activation.gated:
            tiles = _SMALL_ACTIVATION_TILES if small else _ACTIVATION_TILES
    return _narrowest(tiles, columns)


def candidates(contraction: str) -> tuple[PallasBackend, ...]:
    """What `tune` times: every shape of tile, alone and in clusters, and in bands where tiles can be."""
    if contraction == "wgrad":
        return tuple(
            PallasBackend(wgrad_tile=PallasWgradTile(*shape, cluster=cluster))
            for shape in _SHAPES
            for cluster in (1, 2)
        )
    return tuple(
        PallasBackend(matmul_tile=PallasMatmulTile(*shape, band=band, cluster=cluster))
        for shape in _SHAPES
        for cluster in (1, 2)
        for band in (1, 4)
    )


def _least_padding(contraction, num_rows, w_shape):
    if contraction == "wgrad":

        def cost(choice):
            factor, tile = choice
            return factor * _padded(w_shape[1], tile.rows * tile.cluster) * _padded(w_shape[2], tile.columns)

        return min(_OUTER_TILES, key=cost)[1]
    columns = w_shape[2] if contraction == "fwd" else w_shape[1]
    tiles = _SMALL_MATMUL_TILES if num_rows <= SMALL_GROUP * w_shape[0] else _MATMUL_TILES
    return _narrowest(tiles, columns)


def _narrowest(tiles, columns):
    return min(tiles, key=lambda choice: choice[0] * _padded(columns, choice[1].columns * choice[1].cluster))[1]


def _padded(size, tile):
    """Size in whole tiles over size."""
    return -(-size // tile) * tile / size
