"""Grouped matmuls on a Hopper GPU against the float64 reference, for the tests of each backend there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.grouped_matmul import grouped_matmul, reference
from tests.tolerances import assert_close

DEVICE = jax.devices()[0]
needs_hopper = pytest.mark.skipif(
    DEVICE.platform != "gpu" or not {"H100", "H200"} & set(DEVICE.device_kind.split()), reason="needs a Hopper GPU"
)


@functools.cache
def compiled(backend):
    @jax.jit
    def run(rows, w, dout, sizes):
        out, pullback = jax.vjp(lambda rows, w: grouped_matmul(rows, w, sizes, backend=backend), rows, w)
        return out, *pullback(dout)

    return run


def float64(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def check(backend, rng, dtype, sizes, num_rows, in_features, out_features):
    """Values, both gradients, exact zeros and equal bits; the rows of nobody hold NaN."""
    total = int(np.sum(sizes))
    shapes = (num_rows, in_features), (len(sizes), in_features, out_features), (num_rows, out_features)
    rows, w, dout = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    rows[total:] = dout[total:] = np.nan
    rows, w, dout = (jnp.asarray(x, dtype) for x in (rows, w, dout))
    args = rows, w, dout, jnp.asarray(sizes, jnp.int32)
    out, drows, dw = compiled(backend)(*args)
    expected = (
        reference.grouped_matmul(float64(rows), float64(w), sizes),
        reference.grouped_matmul(float64(dout), float64(w), sizes, transpose_w=True),
        reference.grouped_outer(float64(rows), float64(dout), sizes),
    )
    for value, ref in zip((out, drows, dw), expected, strict=True):
        assert_close(float64(value), ref, dtype, f"group sizes {np.asarray(sizes).tolist()}")
    assert not out[total:].any()
    assert not drows[total:].any()
    assert not dw[np.asarray(sizes) == 0].any()
    for first, again in zip((out, drows, dw), compiled(backend)(*args), strict=True):
        assert (np.asarray(first) == np.asarray(again)).all()
