"""Values and gradients of every backend against a float64 loop over rows."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_latent_moe.grouped_matmul import grouped_matmul, reference
from tests.conformance.backends import compiled, every_backend, oracle_matmul, oracle_run, random_group_sizes
from tests.tolerances import assert_close

NAMES = ("out", "gradient of rows", "gradient of w", "wgrad")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EXPERTS, K, N, ROWS = 8, 5, 7, 24


def draw(rng, dtype="float32", rows=ROWS, experts=EXPERTS, k=K, n=N, transpose_w=False):
    """Rows, weights and output gradient."""
    a, b = (n, k) if transpose_w else (k, n)
    return (rng.normal(size=shape).astype(DTYPES[dtype]) for shape in ((rows, a), (experts, k, n), (rows, b)))


def check(backend, rows, w, group_sizes, dout, dtype="float32", transpose_w=False):
    out = compiled(backend, transpose_w)(rows, w, group_sizes, dout)
    for name, value, expected in zip(NAMES, out, oracle_run(rows, w, group_sizes, dout, transpose_w), strict=True):
        assert value.dtype == rows.dtype
        assert_close(value, expected, dtype, f"{name} for group sizes {group_sizes}")


@every_backend
@pytest.mark.parametrize("transpose_w", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_groups(rng, backend, dtype, transpose_w):
    for total in (ROWS, ROWS - 5, ROWS):
        rows, w, dout = draw(rng, dtype, transpose_w=transpose_w)
        check(backend, rows, w, random_group_sizes(rng, EXPERTS, total), dout, dtype, transpose_w)


@every_backend
@pytest.mark.parametrize(
    ("rows", "experts", "k", "n"),
    [(1, 1, 1, 1), (1, 5, 3, 2), (97, 3, 33, 17), (40, 20, 16, 1), (0, 4, 3, 2), (6, 1, 4, 4)],
)
def test_sizes_that_no_block_divides(rng, backend, rows, experts, k, n):
    left, w, dout = draw(rng, rows=rows, experts=experts, k=k, n=n)
    check(backend, left, w, random_group_sizes(rng, experts, rows), dout)


@every_backend
def test_every_pattern_of_empty_experts(rng, backend):
    rows, w, dout = draw(rng)
    for pattern in itertools.product([0, 1], repeat=EXPERTS):
        present = np.flatnonzero(pattern)
        group_sizes = np.zeros(EXPERTS, np.int32)
        if present.size:
            group_sizes[present] = 1 + np.bincount(
                rng.integers(present.size, size=ROWS - present.size), minlength=present.size
            )
        check(backend, rows, w, group_sizes, dout)
        dw = np.asarray(compiled(backend)(rows, w, group_sizes, dout)[2])
        assert not dw[group_sizes == 0].any(), f"experts without rows have a gradient: {group_sizes}"


@every_backend
@pytest.mark.parametrize("expert", range(EXPERTS))
def test_all_rows_on_one_expert(rng, backend, expert):
    rows, w, dout = draw(rng)
    check(backend, rows, w, (ROWS * np.eye(EXPERTS, dtype=np.int32))[expert], dout)


@every_backend
@pytest.mark.parametrize("total", [0, 1, ROWS - 1])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_rows_beyond_the_groups_leak_nowhere(rng, backend, total, poison):
    rows, w, dout = draw(rng)
    group_sizes = random_group_sizes(rng, EXPERTS, total)
    expected = oracle_run(rows, w, group_sizes, dout)
    rows[total:], dout[total:] = poison, poison
    out = compiled(backend)(rows, w, group_sizes, dout)
    for name, value, wanted in zip(NAMES, out, expected, strict=True):
        assert_close(value, wanted, "float32", name)
    assert not np.asarray(out[0])[total:].any()
    assert not np.asarray(out[1])[total:].any()


@every_backend
def test_nan_row_poisons_its_own_row_alone(rng, backend):
    rows, w, dout = draw(rng)
    group_sizes = random_group_sizes(rng, EXPERTS, ROWS)
    row = int(rng.integers(ROWS))
    expected = oracle_matmul(rows, w, group_sizes)
    rows[row] = np.nan
    out = np.asarray(compiled(backend)(rows, w, group_sizes, dout)[0])
    assert np.isnan(out[row]).all()
    assert_close(np.delete(out, row, 0), np.delete(expected, row, 0), "float32")


@every_backend
def test_sizes_that_cannot_be_refused_under_jit_are_cut(rng, backend):
    rows, w, dout = draw(rng)
    for given, counted in [
        ([20, 20, 0, 0, 0, 0, 0, 3], [20, 4, 0, 0, 0, 0, 0, 0]),
        ([4, -3, 5, 0, 0, 0, 0, 2], [4, 0, 5, 0, 0, 0, 0, 2]),
        ([-(2**31), 24, 0, 0, 0, 0, 0, 0], [0, 24, 0, 0, 0, 0, 0, 0]),
    ]:
        out = compiled(backend)(rows, w, np.array(given, np.int32), dout)
        for name, value, wanted in zip(NAMES, out, oracle_run(rows, w, counted, dout), strict=True):
            assert_close(value, wanted, "float32", f"{name} for group sizes {given}")


@every_backend
def test_float64(rng, backend):
    with jax.enable_x64(True):
        rows, w, dout = (rng.normal(size=shape) for shape in ((ROWS, K), (EXPERTS, K, N), (ROWS, N)))
        check(backend, rows, w, random_group_sizes(rng, EXPERTS, ROWS), dout, "float64")


@every_backend
def test_second_derivative(rng, backend):
    """The gradient of a gradient: both rules differentiate through each other."""
    rows, w, dout = draw(rng)
    group_sizes = random_group_sizes(rng, EXPERTS, ROWS - 2)

    def gradient_norm(matmul):
        def loss(rows, w):
            return jnp.sum(jnp.sin(matmul(rows, w)) * dout)

        def norm(rows, w):
            return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(rows, w))

        return jax.jit(jax.grad(norm, (0, 1)))(rows, w)

    experts = np.repeat(np.arange(EXPERTS + 1), [*group_sizes, 2])
    one_hot = np.eye(EXPERTS + 1, dtype=np.float32)[experts, :EXPERTS]
    ours = gradient_norm(lambda rows, w: grouped_matmul(rows, w, group_sizes, backend=backend))
    dense = gradient_norm(lambda rows, w: jnp.einsum("rk,ekn,re->rn", rows, w, one_hot))
    for value, wanted in zip(ours, dense, strict=True):
        assert_close(value, wanted, "float32")


@pytest.mark.parametrize("transpose_w", [False, True])
def test_shipped_reference_agrees(rng, transpose_w):
    rows, w, dout = draw(rng, transpose_w=transpose_w)
    group_sizes = random_group_sizes(rng, EXPERTS, ROWS - 3)
    out, _, _, outer = oracle_run(rows, w, group_sizes, dout, transpose_w)
    shipped = reference.grouped_matmul(rows, w, group_sizes, transpose_w=transpose_w)
    assert_close(shipped, out, "float64")
    assert_close(reference.grouped_wgrad(rows, dout, group_sizes), outer, "float64")
