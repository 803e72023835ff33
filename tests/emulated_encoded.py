"""The epilogue of FP8 products that stores codes on the CPU, compiled by the host's compiler (tests/emulation)."""

import ctypes

import jax.numpy as jnp
import numpy as np

from tests.emulated import aligned, compiled

TILE_ROWS = (128, 192, 256)


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("product", "hidden", "codes", "scales", "sizes")),
        *((name, ctypes.c_int) for name in ("experts", "rows", "width")),
        *((name, ctypes.c_bool) for name in ("power_of_two", "rows_first")),
    )


def codes_of_relu2(product, sizes, *, tile_rows, power_of_two, keeps_hidden, rows_first=False):
    """(hidden, codes, scales) of the epilogue. Results that it does not write hold garbage; hidden may be None.

    Args:
        product: [R, m] float32, the accumulators. Those of padding rows are not read.
        sizes: [E] int32.
        tile_rows: rows of a tile, 128, 192 or 256.
        power_of_two: whether scales are powers of two.
        keeps_hidden: whether the hidden rows are stored too.
        rows_first: the order of the tiles.
    """
    product, sizes = map(aligned, (product, sizes))
    rows, width = product.shape
    hidden = aligned(np.full((rows, width), 77, jnp.bfloat16)) if keeps_hidden else None
    codes = aligned(np.full((rows, width), 77, np.uint8))
    scales = aligned(np.full((-(-width // 128), rows), 77, np.float32))
    given = (None if array is None else array.ctypes.data for array in (product, hidden, codes, scales, sizes))
    call = Call(*given, len(sizes), rows, width, power_of_two, rows_first)
    compiled("encoded").encoded(ctypes.byref(call), tile_rows)
    return hidden, codes, scales
