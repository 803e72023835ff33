"""The compiled encoders of rows on a Hopper GPU, against the definition of the format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.native import library
from jax_latent_moe.row_encoders import RowEncoder
from tests.emulated_rows import SOURCES
from tests.gpu.grouped import needs_hopper
from tests.oracle import formats as oracle
from tests.test_row_encoders import FORMATS, check_codes, check_gradient, rows_of

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("shape", [(67, 264), (1000, 2688), (4096, 1024), (9, 136)], ids=str)
def test_codes_to_the_bit(rng, shape, dtype, format):
    rows = rows_of(rng, shape, dtype)
    check_codes(jax.jit(RowEncoder(format, None))(rows), rows, format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(67, 264), (1000, 2688), (9, 136)], ids=str)
def test_the_gradient_of_relu2_and_its_codes(rng, shape, dtype, format):
    check_gradient(rng, shape, dtype, format)


def test_no_rows():
    assert jax.jit(RowEncoder("fp8_block", None))(jnp.zeros((0, 256), jnp.bfloat16)).shape == (0, 256)


def test_more_than_2_to_the_31_elements(rng):
    """Addresses have 64 bits: the last rows of a large array."""
    last = jnp.asarray(rng.normal(size=(70, 2688)), jnp.bfloat16)
    rows = jnp.zeros((2**31 // 2688 + 100, 2688), jnp.bfloat16).at[-70:].set(last)
    found = jax.jit(RowEncoder("fp8_block", None))(rows)
    codes, scales = oracle.fp8_block(np.asarray(last, np.float32), n_block=1, least=1e-30)
    np.testing.assert_array_equal(found.codes[-70:], codes)
    np.testing.assert_array_equal(found.scales["block"][-70:], scales["block"])
