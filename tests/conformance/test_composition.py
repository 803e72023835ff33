"""Every row of the conformance table under every transformation of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import native
from jax_latent_moe.grouped_matmul import grouped_matmul, grouped_wgrad
from tests.conformance.oracle import compiled, oracle_matmul, oracle_run, random_group_sizes
from tests.conformance.rows import DTYPES, every_row
from tests.tolerances import assert_close

EXPERTS, WIDTH, ROWS, LAYERS = 4, 6, 10, 3


@pytest.fixture
def arrays(rng, row):
    """Rows, w, group sizes and output gradient, with a leading axis of LAYERS."""
    width, dtype = row.size(WIDTH), DTYPES[row.dtype]
    rows, dout = rng.normal(size=(2, LAYERS, ROWS, width)).astype(dtype)
    w = (rng.normal(size=(LAYERS, EXPERTS, width, width)) / np.sqrt(width)).astype(dtype)
    totals = ROWS, ROWS - 3, ROWS
    return rows, w, np.stack([random_group_sizes(rng, EXPERTS, total) for total in totals]), dout


@every_row
def test_not_jitted(arrays, row):
    rows, w, group_sizes, _ = (array[0] for array in arrays)
    assert_close(
        grouped_matmul(rows, w, group_sizes, backend=row.backend), oracle_matmul(rows, w, group_sizes), row.dtype
    )


@every_row
def test_vmap(arrays, row):
    run = jax.vmap(compiled(row))
    out = run(*arrays)
    for i in range(LAYERS):
        expected = oracle_run(*(array[i] for array in arrays))
        for name, values in out.items():
            assert_close(values[i], expected[name], row.dtype, name)


@every_row
def test_vmap_over_rows_alone(arrays, row):
    rows, w, group_sizes, _ = arrays
    out = jax.vmap(lambda rows: grouped_matmul(rows, w[0], group_sizes[0], backend=row.backend))(rows)
    for value, one in zip(out, rows, strict=True):
        assert_close(value, oracle_matmul(one, w[0], group_sizes[0]), row.dtype)


def chain_oracle(rows, w, group_sizes):
    for kernel, sizes in zip(w, group_sizes, strict=True):
        rows = oracle_matmul(rows, kernel, sizes)
    return rows


@every_row
@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers_with_gradients(arrays, row, remat):
    rows, w, group_sizes, dout = arrays
    group_sizes[1] = group_sizes[0]  # a row affects the result only if it has an expert in every layer

    def layer(rows, weights):
        return grouped_matmul(rows, *weights, backend=row.backend), None

    def loss(w):
        out = jax.lax.scan(jax.checkpoint(layer) if remat else layer, rows[0], (w, group_sizes))[0]
        return jnp.sum(out * dout[0]), out

    (_, out), dw = jax.jit(jax.value_and_grad(loss, has_aux=True))(w)
    assert_close(out, chain_oracle(rows[0], w, group_sizes), row.dtype)
    gradient = np.float64(dout[0])
    for i in reversed(range(LAYERS)):
        before = chain_oracle(rows[0], w[:i], group_sizes[:i])
        expected = oracle_run(before, w[i], group_sizes[i], gradient)
        assert_close(dw[i], expected["gradient of w"], row.dtype, f"gradient of layer {i}")
        gradient = expected["gradient of rows"]


@every_row
def test_export(arrays, row):
    one = [array[0] for array in arrays]
    exported = jax.export.export(compiled(row), disabled_checks=native.export_checks())(*one)
    expected = oracle_run(*one)
    for name, value in exported.call(*one).items():
        assert_close(value, expected[name], row.dtype, name)


@every_row
def test_lowers_for_cuda(arrays, row):
    rows, w, group_sizes, dout = (array[0] for array in arrays)
    lowered = compiled(row).trace(rows, w, group_sizes, dout).lower(lowering_platforms=("cuda",))
    assert "stablehlo" in lowered.as_text()


@every_row
def test_one_trace_per_shape(arrays, row):
    traces = []

    @jax.jit
    def run(rows, w, group_sizes):
        traces.append(rows.shape)
        return grouped_matmul(rows, w, group_sizes, backend=row.backend)

    for rows, w, group_sizes, _ in zip(*arrays, strict=True):
        run(rows, w, group_sizes)
    assert traces == [(ROWS, row.size(WIDTH))]


@every_row
def test_wgrad_is_differentiable(arrays, row):
    rows, w, group_sizes, dout = (array[0] for array in arrays)

    def loss(rows, dout):
        return jnp.sum(grouped_wgrad(rows, dout, group_sizes, backend=row.backend) * w)

    drows, ddout = jax.jit(jax.grad(loss, (0, 1)))(rows, dout)
    assert_close(drows, oracle_matmul(dout, w, group_sizes, transpose_w=True), row.dtype)
    assert_close(ddout, oracle_matmul(rows, w, group_sizes), row.dtype)
