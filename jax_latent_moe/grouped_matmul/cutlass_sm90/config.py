"""Settings of the `cutlass` backend for Hopper GPUs."""

import dataclasses

from jax_latent_moe import checks
from jax_latent_moe.grouped_matmul.sm90 import FUSE, Fuse


@dataclasses.dataclass(frozen=True)
class CutlassTile:
    """Tile and schedule of a compiled kernel of the `cutlass` backend; only the combinations that were compiled run.

    The two warpgroups of an SM take tiles in turn: one stores while the other multiplies.

    Attributes:
        rows: rows of a tile; in wgrad, its part of the first feature axis (K).
        columns: output columns of a tile; in wgrad, its part of the second feature axis (N).
        stages: loads in flight, in a ring through shared memory.
        cluster_rows: SMs whose tiles lie one above the other and share the loads of a column tile (wgrad only).
        cluster_columns: SMs whose tiles lie side by side and share the loads of a row tile.
        rows_first: whether tiles go down the rows of an expert before they go along its columns (not in wgrad).
    """

    rows: int = 128
    columns: int = 192
    stages: int = 5
    cluster_rows: int = 1
    cluster_columns: int = 2
    rows_first: bool = False

    def __post_init__(self):
        for field in ("rows", "columns", "stages", "cluster_rows", "cluster_columns"):
            checks.positive_int(f"CutlassTile.{field}", getattr(self, field))
        checks.instance("CutlassTile.rows_first", self.rows_first, bool)


@dataclasses.dataclass(frozen=True)
class CutlassBackend:
    """Expert matmuls as compiled Hopper kernels on CUTLASS' instruction wrappers, behind XLA FFI custom calls.

    Attributes:
        matmul_tile: tile of fwd and dgrad without a fused activation; None takes the measured tile of the shape, or a
            heuristic's.
        wgrad_tile: tile of wgrad; None likewise.
        fuse: which activations and gradients run inside of a product. "measured" takes those that gained time where
            they were measured. "always" takes all that were compiled, and needs the least memory. "never" takes none.
    """

    matmul_tile: CutlassTile | None = None
    wgrad_tile: CutlassTile | None = None
    fuse: Fuse = "measured"

    def __post_init__(self):
        checks.one_of("CutlassBackend.fuse", self.fuse, FUSE)
        for field in ("matmul_tile", "wgrad_tile"):
            if getattr(self, field) is not None:
                checks.instance(f"CutlassBackend.{field}", getattr(self, field), CutlassTile)
