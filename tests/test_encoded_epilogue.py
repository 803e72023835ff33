"""The epilogue of FP8 products that encodes relu2's hidden rows, on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import native
from tests import emulated, emulated_encoded, emulated_rows

NUM_ROWS = 421
GROUPS = {
    "ragged": np.array([0, 1, 130, 0, 65, 193, 0, 16]),
    "one expert": np.array([0, 0, NUM_ROWS, 0]),
    "one row": np.array([0, 0, 0, 1]),
    "none": np.zeros(3, int),
}


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
def test_the_epilogue_gives_the_bits_of_an_encoder_behind_the_hidden_rows(rng, monkeypatch, tile_rows, width):
    """Padding rows get zeros, whatever they held."""
    monkeypatch.setattr(native, "call", emulated_rows.call)
    product = drawn(rng, width)
    for groups, sizes in GROUPS.items():
        count, inside = sizes.sum(), np.arange(NUM_ROWS)[:, None] < sizes.sum()
        pre = np.where(inside, product, 0).astype(jnp.bfloat16).astype(np.float32)
        with np.errstate(over="ignore"):
            hidden = np.square(np.where(pre < 0, 0, pre)).astype(jnp.bfloat16)
        for power_of_two in (False, True):
            expected = native.call(
                "encode_rows",
                [jnp.asarray(hidden)],
                [
                    jax.ShapeDtypeStruct((NUM_ROWS, width), jnp.uint8),
                    jax.ShapeDtypeStruct((-(-width // 128), NUM_ROWS), jnp.float32),
                ],
                power_of_two=power_of_two,
            )
            for keeps_hidden, rows_first in ((False, False), (True, True)):
                kept, *found = emulated_encoded.codes_of_relu2(
                    np.where(inside, product, np.nan).astype(np.float32),
                    sizes.astype(np.int32),
                    tile_rows=tile_rows,
                    power_of_two=power_of_two,
                    keeps_hidden=keeps_hidden,
                    rows_first=rows_first,
                )
                for name, one, other in zip(("codes", "scales"), found, expected, strict=True):
                    np.testing.assert_array_equal(one, other, err_msg=f"{name} {groups} {power_of_two}")
                assert not found[0][count:].any()
                if keeps_hidden:
                    np.testing.assert_array_equal(np.float32(kept), np.float32(hidden), err_msg=groups)
