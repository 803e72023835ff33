"""Settings of the `cutlass` backend for Hopper GPUs."""

import dataclasses

from jax_latent_moe import checks
from jax_latent_moe.grouped_matmul.sm90 import FUSE, Fuse


@dataclasses.dataclass(frozen=True)
class CutlassTile:
    """Tile and schedule of a compiled kernel of the `cutlass` backend. Only combinations that were compiled can run.

    The two consumer warpgroups of an SM take tiles in turn: one stores while the other multiplies.

    Attributes:
        rows: rows of a tile; in wgrad, its part of the first feature axis (K).
        columns: output columns of a tile; in wgrad, its part of the second feature axis (N).
        stages: loads in flight, in a ring buffer in shared memory.
        cluster_rows: SMs with tiles of the same columns, which share the loads of those columns (wgrad only).
        cluster_columns: SMs with tiles of the same rows, which share the loads of those rows.
        rows_first: whether tiles go through the rows of an expert before the columns (not in wgrad).
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
        matmul_tile: tile of fwd and dgrad without a fused activation. None takes a measured tile for the shape, or the
            heuristic's if there is none.
        wgrad_tile: tile of wgrad, chosen in the same way if it is None.
        fuse: which activations and gradients run inside of a product. "measured" fuses those that were faster when they
            were measured. "always" fuses all that were compiled and needs the least memory. "never" fuses none. An FP8
            product may also encode the hidden rows, or the gradient, for the next product, by the same rule.
        decode: when the kernels for few tokens run the experts, if nothing is differentiated. "measured" uses them for
            one token, and for up to 64 tokens if the experts are in codes: at 1, 8 and 64 they were faster. "always"
            uses them for up to 256 assignments, or up to 8192 if the experts are in codes and have at most 16 each on
            average. "never" uses them for none. `jax_latent_moe.decode` says which layers and formats they take.
    """

    matmul_tile: CutlassTile | None = None
    wgrad_tile: CutlassTile | None = None
    fuse: Fuse = "measured"
    decode: Fuse = "measured"

    def __post_init__(self):
        checks.one_of("CutlassBackend.fuse", self.fuse, FUSE)
        checks.one_of("CutlassBackend.decode", self.decode, FUSE)
        for field in ("matmul_tile", "wgrad_tile"):
            if getattr(self, field) is not None:
                checks.instance(f"CutlassBackend.{field}", getattr(self, field), CutlassTile)
