"""Settings of the `cutlass` backend for Hopper GPUs."""

import dataclasses

from jax_latent_moe import checks
from jax_latent_moe.grouped_matmul.sm90 import FUSE, Fuse


@dataclasses.dataclass(frozen=True)
class CutlassTile:
    """Tile and schedule of a compiled kernel of the `cutlass` backend; only the combinations that were compiled run.

    A tile of more than 192 x 128 elements is shared by both warpgroups of a SM, which otherwise take tiles
    in turn, one storing while the other multiplies.

    Attributes:
        rows: rows of a tile; in wgrad, the first feature axis (K).
        columns: output columns of a tile; in wgrad, the second feature axis (N).
        stages: loads in flight, in a ring through shared memory.
        cluster_rows: SMs, one above the other, that share the loads of a column tile (wgrad only).
        cluster_columns: SMs, side by side, that share the loads of a row tile.
        rows_first: walk down the rows of an expert before its columns (not in wgrad).
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
        matmul_tile: tile of fwd and dgrad without a fused activation; None takes the measured one for the
            shape, or a heuristic.
        wgrad_tile: tile of wgrad; None likewise.
        fuse: which activations, and gradients of them, run inside of a product: "measured" those that gained time
            where they were measured, "always" all that were compiled, which takes the least memory, "never" none.
    """

    matmul_tile: CutlassTile | None = None
    wgrad_tile: CutlassTile | None = None
    fuse: Fuse = "measured"

    def __post_init__(self):
        checks.one_of("CutlassBackend.fuse", self.fuse, FUSE)
        for field in ("matmul_tile", "wgrad_tile"):
            if getattr(self, field) is not None:
                checks.instance(f"CutlassBackend.{field}", getattr(self, field), CutlassTile)
