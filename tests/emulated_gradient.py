"""FP8 dgrad with relu2's gradient: its epilogue on the CPU, compiled by the host's compiler (tests/emulation)."""

import ctypes

import numpy as np

from tests.emulated import aligned, compiled

TILE_ROWS = (128, 192)


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("product", "hidden", "row_weights", "codes", "scales", "sums", "sizes")),
        *((name, ctypes.c_int) for name in ("experts", "rows", "width")),
        *((name, ctypes.c_bool) for name in ("power_of_two", "rows_first")),
    )


def gradient(product, hidden, row_weights, sizes, *, tile_rows, power_of_two, rows_first=False):
    """(dpre, codes, scales, row_weight_sums) of the epilogue. Results that it does not write hold garbage.

    Args:
        product: [R, m] float32, the accumulators. Those of padding rows are not read.
        hidden: [R, m] bfloat16.
        row_weights: [R] float32.
        sizes: [E] int32.
        tile_rows: rows of a tile, 128 or 192.
        power_of_two: whether scales are powers of two.
        rows_first: the order of the tiles.
    """
    product, dpre, row_weights, sizes = map(aligned, (product, hidden, row_weights, sizes))
    rows, width = product.shape
    codes = aligned(np.full((rows, width), 77, np.uint8))
    scales, sums = (aligned(np.full((-(-width // 128), rows), 77, np.float32)) for _ in range(2))
    arrays = (array.ctypes.data for array in (product, dpre, row_weights, codes, scales, sums, sizes))
    call = Call(*arrays, len(sizes), rows, width, power_of_two, rows_first)
    compiled("encoded_gradient").encoded_gradient(ctypes.byref(call), tile_rows)
    return dpre, codes, scales, sums
