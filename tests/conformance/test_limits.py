"""Group sizes of any int32, and an expert that holds NaN."""

import jax
import numpy as np
import pytest

from jax_latent_moe import XlaBackend
from jax_latent_moe.grouped_matmul import grouped_matmul, grouped_wgrad
from tests.conformance.backends import every_backend, oracle_matmul, oracle_wgrad
from tests.tolerances import assert_close

EXPERTS, WIDTH, ROWS = 5, 6, 20
BIG = 2**31 - 1


@every_backend
@pytest.mark.parametrize(
    "sizes",
    [(BIG, 1, 1, 1, 1), (BIG, BIG, 3, 1, 1), (4, BIG, BIG, BIG, BIG), (3, -(2**31), 2, BIG, 7), (2, -5, 30, 1, BIG)],
    ids=str,
)
def test_sums_beyond_int32_are_cut_to_the_rows(rng, backend, sizes):
    """Under jit a negative size counts as 0 and rows that do not exist are left out."""
    rows, dout = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    w = rng.normal(size=(EXPERTS, WIDTH, WIDTH)).astype(np.float32)
    ends = np.minimum(np.cumsum(np.maximum(np.int64(sizes), 0)), ROWS)
    cut = np.diff(ends, prepend=0)
    sizes = np.int32(sizes)
    out = jax.jit(lambda *a: grouped_matmul(*a, backend=backend))(rows, w, sizes)
    assert_close(out, oracle_matmul(rows, w, cut), "float32")
    wgrad = jax.jit(lambda *a: grouped_wgrad(*a, backend=backend))(rows, dout, sizes)
    assert_close(wgrad, oracle_wgrad(rows, dout, cut), "float32")


@every_backend
def test_an_expert_of_nan_spoils_its_own_rows(rng, backend):
    """ragged_dot is expanded to a dense product off TPUs, and cannot: docs/backends.md says so."""
    rows = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    w = rng.normal(size=(EXPERTS, WIDTH, WIDTH)).astype(np.float32)
    w[2] = np.nan
    out = np.asarray(jax.jit(lambda *a: grouped_matmul(*a, backend=backend))(rows, w, np.full(EXPERTS, 4, np.int32)))
    spoiled = np.isnan(out).any(axis=1)
    if backend == XlaBackend(method="ragged_dot") and jax.default_backend() != "tpu":
        assert spoiled.all()
    else:
        np.testing.assert_array_equal(spoiled, np.arange(ROWS) // 4 == 2)
