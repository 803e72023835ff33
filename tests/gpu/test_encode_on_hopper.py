"""The compiled encoder of weights on a Hopper GPU, against the definition of the format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.formats.both_layouts import encode_both
from jax_latent_moe.native import library
from tests.gpu.grouped import needs_hopper
from tests.oracle import formats as oracle

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]


@pytest.mark.parametrize("format", ["fp8_block", "fp8_block_pow2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_both_layouts_to_the_bit(rng, dtype, format):
    """Blocks of zeros, of tiny and of large numbers; those with NaN or infinity decode to NaN."""
    w = rng.normal(size=(3, 256, 768)) * rng.uniform(0.001, 3, size=(3, 256, 768))
    w[0, :128, :128] = 0
    w[1, 128:, :128] *= 1e-6
    w[1, :128, :128] *= 1e3
    w[2, 3, 200], w[2, 200, 3] = np.nan, np.inf
    w = jnp.asarray(w, dtype)
    forward, transposed = jax.jit(encode_both, static_argnums=(1, 2))(w, format, 2)
    assert (forward.shape, transposed.shape) == (w.shape, (3, 768, 256))
    for e, matrix in enumerate(np.asarray(w.astype(jnp.float32))):
        with np.errstate(invalid="ignore"):
            codes, scales = oracle.fp8_block(matrix, power_of_two=format == "fp8_block_pow2")
        np.testing.assert_array_equal(transposed.scales["block"][e, 0], scales["block"])
        finite = np.repeat(np.repeat(np.isfinite(scales["block"]), 128, 0), 128, 1)
        np.testing.assert_array_equal(np.asarray(transposed.codes[e, 0])[finite], codes[finite])
        assert np.isnan(np.asarray(transposed[e : e + 1].decode("float32"))[0].T[~finite]).all()
    across = np.asarray(forward.codes).reshape(3, 768, 256), np.asarray(forward.scales["block"]).reshape(3, 6, 2)
    for found, of_transposed in zip(across, (transposed.codes, transposed.scales["block"]), strict=True):
        np.testing.assert_array_equal(found, np.swapaxes(of_transposed[:, 0], 1, 2))


def test_more_than_2_to_the_31_elements(rng):
    """Addresses have 64 bits: the last block of a large weight."""
    w = jnp.zeros((1056, 1024, 2048), jnp.bfloat16).at[-1, -128:, -128:].set(rng.normal(size=(128, 128)).astype(jnp.bfloat16))
    forward, transposed = jax.jit(encode_both, static_argnums=(1, 2))(w, "fp8_block", 1)
    codes, scales = oracle.fp8_block(np.asarray(w[-1, -128:, -128:].astype(jnp.float32)))
    np.testing.assert_array_equal(transposed.codes[-1, 0, -128:, -128:], codes)
    np.testing.assert_array_equal(forward.codes[-1, 0, -128:, -128:], codes.T)
    assert transposed.scales["block"][-1, 0, -1, -1] == scales["block"][0, 0]
