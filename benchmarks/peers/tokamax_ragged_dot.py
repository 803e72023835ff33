"""tokamax's Mosaic GPU ragged_dot, with its own choice of tiles and with the best of a small sweep."""

import functools
import importlib.util
import logging
import sys
import types

# (block_m, block_n, block_k, num_stages, persistent, grid_minor_dim, grid_tile_width)
ROWS_SWEEP = (
    (128, 128, 64, 4, True, 0, 1),
    (128, 64, 128, 4, True, 0, 1),
    (128, 128, 64, 4, True, 1, 4),
    (128, 128, 64, 4, False, 1, 8),
    (64, 128, 128, 4, True, 0, 4),
    (128, 64, 128, 4, False, 0, 8),
)
OUTER_SWEEP = (
    (128, 128, 64, 4, False, 1, 1),
    (64, 128, 64, 4, False, 1, 1),
    (128, 64, 64, 4, False, 1, 1),
    (64, 256, 64, 2, False, 1, 1),
    (128, 128, 128, 2, False, 1, 1),
)


@functools.cache
def _package():
    """Tokamax's module of GPU kernels, and its module of dimension numbers and gradients.

    Its benchmark helpers import xprof, a profiler that is not used here. If it is missing, an empty module replaces it.
    """
    if "xprof" not in sys.modules and importlib.util.find_spec("xprof") is None:
        parent = None
        for name in ("xprof", "xprof.cli", "xprof.cli.tools", "xprof.cli.tools.get_kernel_stats_tool"):
            module = sys.modules.setdefault(name, types.ModuleType(name))
            if parent is not None:
                setattr(parent, name.rsplit(".", 1)[1], module)
            parent = module
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns about each shape without a tuned tile
    from tokamax._src.ops.ragged_dot import base, pallas_mosaic_gpu  # pyright: ignore[reportMissingImports]

    return pallas_mosaic_gpu, base


def sweep(pass_: str, quick: bool) -> tuple:
    """The tiles to try for a pass; only the first if `quick`."""
    tiles = OUTER_SWEEP if pass_ == "wgrad" else ROWS_SWEEP
    return tiles[:1] if quick else tiles


def operation(tile: tuple | None = None, dgrad: tuple | None = None, wgrad: tuple | None = None):
    """The operation with the given tiles for its forward pass and its two gradients; None is its own choice."""
    module, base = _package()

    def at(tile, **rule):
        names = ("block_m", "block_n", "block_k", "num_stages", "persistent", "grid_minor_dim", "grid_tile_width")
        config = None if tile is None else module.Config(split_k=1, **dict(zip(names, tile, strict=True)))
        return module.PallasMosaicGpuRaggedDot(config=config, **rule)

    gradients = functools.partial(base.vjp, dlhs_ragged_dot=at(dgrad), drhs_ragged_dot=at(wgrad))
    return at(tile, vjp=gradients)


def one_pass(pass_: str, tile: tuple | None, x, w, dout, sizes):
    """One pass of a grouped matmul: x [R, K], w [E, K, N], dout [R, N], sizes [E]."""
    _, base = _package()
    ragged_dot = operation(tile)
    if pass_ == "forward":
        return ragged_dot(x, w, group_sizes=sizes)
    numbers, left, right = {
        "dgrad": (base.TRANS_RHS_RAGGED_DOT_DIM_NUMS, dout, w),
        "wgrad": (base.RAGGED_CONTRACTING_DOT_DIM_NUMS, x, dout),
    }[pass_]
    return ragged_dot(left, right, group_sizes=sizes, ragged_dot_dimension_numbers=numbers)
