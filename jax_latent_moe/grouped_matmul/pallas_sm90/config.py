"""Settings of the `pallas` backend for Hopper GPUs."""

import dataclasses

from jax_latent_moe import checks
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.grouped_matmul.sm90 import FUSE, Fuse

# Limits of a tile: 192 float32 accumulators per thread, and the bytes of shared memory without barriers.
TILE_AREA = 128 * 192
SHARED_MEMORY = 231424


@dataclasses.dataclass(frozen=True)
class PallasMatmulTile:
    """Tile and schedule of the Pallas kernel for fwd and dgrad.

    Attributes:
        rows: rows of a tile, 64, 128 or 192. An incomplete tile multiplies its rows up to the next multiple of 64.
        columns: output columns of a tile, a multiple of 64.
        stages: loads in flight, in a ring buffer in shared memory.
        store_buffers: buffers through which a tile is stored, 64 columns each.
        band: row tiles that are computed together, column by column.
        cluster: SMs, 1 or 2, that share the loads of one row tile.
    """

    rows: int = 128
    columns: int = 192
    stages: int = 4
    store_buffers: int = 2
    band: int = 1
    cluster: int = 1

    def __post_init__(self):
        _check_pallas_tile(self)
        checks.positive_int("PallasMatmulTile.band", self.band)


@dataclasses.dataclass(frozen=True)
class PallasWgradTile:
    """Tile and schedule of the Pallas kernel for wgrad.

    Attributes:
        rows: a tile's part of the first feature axis (K), 64, 128 or 192.
        columns: a tile's part of the second feature axis (N), a multiple of 64.
        stages: loads in flight, in a ring buffer in shared memory.
        store_buffers: buffers through which a tile is stored, 64 columns each.
        cluster: SMs, 1 or 2, that share the loads of one column tile.
    """

    rows: int = 128
    columns: int = 192
    stages: int = 4
    store_buffers: int = 2
    cluster: int = 1

    def __post_init__(self):
        _check_pallas_tile(self)


@dataclasses.dataclass(frozen=True)
class PallasFp8Tile:
    """Tile and schedule of the Pallas kernel for fwd with both operands in block FP8.

    Attributes:
        rows: rows of a tile. The two consumers share 128 rows by rows, 64 rows by columns.
        columns: output columns of a tile, a multiple of 64, or of 128 if rows is 64.
        stages: loads in flight, in a ring buffer in shared memory.
        store_buffers: buffers through which a consumer stores its part of a tile, 64 x 64 each.
        band: row tiles that are computed together, column by column.
        cluster: SMs, 1 or 2, that share the loads of one row tile.
    """

    rows: int = 128
    columns: int = 192
    stages: int = 4
    store_buffers: int = 2
    band: int = 1
    cluster: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            checks.positive_int(f"PallasFp8Tile.{field.name}", getattr(self, field.name))
        if self.rows not in (64, 128):
            raise ConfigError(f"PallasFp8Tile.rows={self.rows} must be 64 or 128: a consumer multiplies 64 rows.")
        multiple, most = (64, 192) if self.rows == 128 else (128, 384)
        if self.columns % multiple or self.columns > most:
            raise ConfigError(
                f"PallasFp8Tile.columns={self.columns} must be a multiple of {multiple}, at most {most}, for "
                f"rows={self.rows}: a consumer has registers for two sums of 64 x 192."
            )
        if self.cluster > 2:
            raise ConfigError(f"PallasFp8Tile.cluster={self.cluster} must be 1 or 2: larger clusters leave SMs idle.")
        used = 128 * (self.stages * (self.rows + self.columns) + 2 * self.store_buffers * 64)
        if used > SHARED_MEMORY:
            raise ConfigError(
                f"PallasFp8Tile takes {used} bytes of shared memory, more than {SHARED_MEMORY}: "
                f"lower stages={self.stages} or store_buffers={self.store_buffers}."
            )


@dataclasses.dataclass(frozen=True)
class PallasWidenTile:
    """Tile and schedule of the Pallas kernel for fwd with bfloat16 rows and a weight in codes.

    Attributes:
        features: outputs of a tile, 128 or 256. The two consumers share them.
        rows: rows of a tile, a multiple of 8, at most 192 for 128 features and 64 for 256. All are multiplied.
        stages: loads in flight of 128 along K, in a ring buffer in shared memory.
        scale_buffers: tiles whose scales are in shared memory, each for all of K.
        store_buffers: buffers through which a consumer stores its part of a tile, 64 outputs each.
        band: row tiles that are computed together, column by column.
    """

    features: int = 128
    rows: int = 64
    stages: int = 6
    scale_buffers: int = 2
    store_buffers: int = 1
    band: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            checks.positive_int(f"PallasWidenTile.{field.name}", getattr(self, field.name))
        if self.features not in (128, 256):
            raise ConfigError(
                f"PallasWidenTile.features={self.features} must be 128 or 256: a consumer widens 64 or 128 outputs."
            )
        most = 192 if self.features == 128 else 64
        if self.rows % 8 or self.rows > most:
            raise ConfigError(
                f"PallasWidenTile.rows={self.rows} must be a multiple of 8, at most {most}, for "
                f"features={self.features}: more sums leave too few registers for two widened operands."
            )


def _check_pallas_tile(tile):
    """Checks that a tile fits a Hopper SM: its accumulators the registers, its buffers the shared memory."""
    name = type(tile).__name__
    for field in ("rows", "columns", "stages", "store_buffers", "cluster"):
        checks.positive_int(f"{name}.{field}", getattr(tile, field))
    if tile.rows not in (64, 128, 192) or tile.columns % 64:
        raise ConfigError(
            f"{name}.rows={tile.rows} must be 64, 128 or 192 and columns={tile.columns} a multiple of 64: the kernels "
            "compute blocks of 64 x 64."
        )
    if tile.columns > 256 or tile.rows * tile.columns > TILE_AREA:
        raise ConfigError(
            f"{name}.rows={tile.rows} x columns={tile.columns} does not fit the registers: columns are at most 256 "
            f"and rows x columns at most {TILE_AREA}."
        )
    if tile.cluster > 2:
        raise ConfigError(f"{name}.cluster={tile.cluster} must be 1 or 2: larger clusters leave SMs idle.")
    used = 128 * (tile.stages * (tile.rows + tile.columns) + 2 * tile.store_buffers * tile.rows)
    if used > SHARED_MEMORY:
        raise ConfigError(
            f"{name} takes {used} bytes of shared memory, more than {SHARED_MEMORY}: "
            f"lower stages={tile.stages} or store_buffers={tile.store_buffers}."
        )


@dataclasses.dataclass(frozen=True)
class PallasBackend:
    """Expert matmuls as Pallas (Mosaic GPU) kernels for Hopper GPUs.

    Attributes:
        matmul_tile: tile of fwd and dgrad without a fused activation. None takes a measured tile for the shape, or the
            heuristic's if there is none.
        wgrad_tile: tile of wgrad, chosen in the same way if it is None.
        fp8_tile: tile of fwd with both operands in block FP8, chosen in the same way if it is None.
        widen_tile: tile of fwd with bfloat16 rows and a weight in codes, chosen in the same way if it is None.
        fuse: which activations and gradients run inside of a product. "measured" fuses those that were faster when they
            were measured. "always" fuses all and needs the least memory. "never" fuses none.
    """

    matmul_tile: PallasMatmulTile | None = None
    wgrad_tile: PallasWgradTile | None = None
    fp8_tile: PallasFp8Tile | None = None
    widen_tile: PallasWidenTile | None = None
    fuse: Fuse = "measured"

    def __post_init__(self):
        checks.one_of("PallasBackend.fuse", self.fuse, FUSE)
        if self.matmul_tile is not None:
            checks.instance("PallasBackend.matmul_tile", self.matmul_tile, PallasMatmulTile)
        if self.wgrad_tile is not None:
            checks.instance("PallasBackend.wgrad_tile", self.wgrad_tile, PallasWgradTile)
        if self.fp8_tile is not None:
            checks.instance("PallasBackend.fp8_tile", self.fp8_tile, PallasFp8Tile)
        if self.widen_tile is not None:
            checks.instance("PallasBackend.widen_tile", self.widen_tile, PallasWidenTile)
