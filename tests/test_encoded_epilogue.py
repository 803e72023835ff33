"""The epilogue of FP8 products that encodes relu2's hidden rows, on the CPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import emulated, emulated_encoded
from tests.oracle import formats as oracle
from tests.test_encoded_gradient import GROUPS, NUM_ROWS


def drawn(rng, width):
    """Accumulators of many sizes, some of them NaN, infinite, or with squares that are subnormal or infinite."""
    product = rng.normal(size=(NUM_ROWS, width)) * rng.uniform(1e-3, 3, size=(NUM_ROWS, 1))
    product[5] *= 1e19
    product[6] *= 1e-19
    product[7] = -np.abs(product[7])
    product[8, ::3], product[9, 5], product[10, 7], product[11] = 1e20, np.inf, np.nan, -0.0
    return product.astype(np.float32)


@pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")
@pytest.mark.parametrize("tile_rows", emulated_encoded.TILE_ROWS)
@pytest.mark.parametrize("width", [272, 128, 16], ids=str)
def test_the_epilogue_stores_the_codes_of_the_rounded_hidden_rows(rng, tile_rows, width):
    """Padding rows get zeros, whatever they held."""
    product = drawn(rng, width)
    for groups, sizes in GROUPS.items():
        count, inside = sizes.sum(), np.arange(NUM_ROWS)[:, None] < sizes.sum()
        pre = np.where(inside, product, 0).astype(jnp.bfloat16).astype(np.float32)
        with np.errstate(over="ignore"):
            hidden = np.square(np.where(pre < 0, 0, pre)).astype(jnp.bfloat16).astype(np.float32)
        for power_of_two in (False, True):
            with np.errstate(invalid="ignore"):
                codes, scales = oracle.fp8_block(hidden, power_of_two, n_block=1, least=1e-30)
            for keeps_hidden, rows_first in ((False, False), (True, True)):
                kept, *found = emulated_encoded.codes_of_relu2(
                    np.where(inside, product, np.nan).astype(np.float32),
                    sizes.astype(np.int32),
                    tile_rows=tile_rows,
                    power_of_two=power_of_two,
                    keeps_hidden=keeps_hidden,
                    rows_first=rows_first,
                )
                label = f"{groups} {power_of_two}"
                np.testing.assert_array_equal(oracle.E4M3_VALUES[found[0]], oracle.E4M3_VALUES[codes], label)
                np.testing.assert_array_equal(found[1], scales["block"].T, label)
                assert not found[0][count:].any()
                if keeps_hidden:
                    np.testing.assert_array_equal(np.float32(kept), hidden, label)
