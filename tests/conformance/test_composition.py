"""Every backend under every transformation of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.grouped_matmul import grouped_matmul, grouped_wgrad
from tests.conformance.backends import compiled, every_backend, oracle_matmul, oracle_run, random_group_sizes
from tests.tolerances import assert_close

EXPERTS, WIDTH, ROWS, LAYERS = 4, 6, 10, 3


@pytest.fixture
def arrays(rng):
    """Rows, w, group sizes and output gradient, with a leading axis of LAYERS."""
    rows, dout = rng.normal(size=(2, LAYERS, ROWS, WIDTH)).astype(np.float32)
    w = rng.normal(size=(LAYERS, EXPERTS, WIDTH, WIDTH)).astype(np.float32)
    totals = ROWS, ROWS - 3, ROWS
    return rows, w, np.stack([random_group_sizes(rng, EXPERTS, total) for total in totals]), dout


@every_backend
def test_not_jitted(arrays, backend):
    rows, w, group_sizes, _ = (array[0] for array in arrays)
    assert_close(grouped_matmul(rows, w, group_sizes, backend=backend), oracle_matmul(rows, w, group_sizes), "float32")


@every_backend
def test_vmap(arrays, backend):
    run = jax.vmap(compiled(backend))
    for i, values in enumerate(zip(*run(*arrays), strict=True)):
        for value, expected in zip(values, oracle_run(*(array[i] for array in arrays)), strict=True):
            assert_close(value, expected, "float32")


@every_backend
def test_vmap_over_rows_alone(arrays, backend):
    rows, w, group_sizes, _ = arrays
    out = jax.vmap(lambda rows: grouped_matmul(rows, w[0], group_sizes[0], backend=backend))(rows)
    for value, one in zip(out, rows, strict=True):
        assert_close(value, oracle_matmul(one, w[0], group_sizes[0]), "float32")


def chain_oracle(rows, w, group_sizes):
    for kernel, sizes in zip(w, group_sizes, strict=True):
        rows = oracle_matmul(rows, kernel, sizes)
    return rows


@every_backend
@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers_with_gradients(arrays, backend, remat):
    rows, w, group_sizes, dout = arrays
    group_sizes[1] = group_sizes[0]  # a row must have an expert in every layer to matter

    def layer(rows, weights):
        return grouped_matmul(rows, *weights, backend=backend), None

    def loss(w):
        out = jax.lax.scan(jax.checkpoint(layer) if remat else layer, rows[0], (w, group_sizes))[0]
        return jnp.sum(out * dout[0]), out

    (_, out), dw = jax.jit(jax.value_and_grad(loss, has_aux=True))(w)
    assert_close(out, chain_oracle(rows[0], w, group_sizes), "float32")
    gradient = np.float64(dout[0])
    for i in reversed(range(LAYERS)):
        before = chain_oracle(rows[0], w[:i], group_sizes[:i])
        _, drows, expected, _ = oracle_run(before, w[i], group_sizes[i], gradient)
        assert_close(dw[i], expected, "float32", f"gradient of layer {i}")
        gradient = drows


@every_backend
def test_export(arrays, backend):
    one = [array[0] for array in arrays]
    exported = jax.export.export(compiled(backend))(*one)
    for value, expected in zip(exported.call(*one), oracle_run(*one), strict=True):
        assert_close(value, expected, "float32")


@every_backend
def test_lowers_for_cuda(arrays, backend):
    rows, w, group_sizes, dout = (array[0] for array in arrays)
    lowered = compiled(backend).trace(rows, w, group_sizes, dout).lower(lowering_platforms=("cuda",))
    assert "stablehlo" in lowered.as_text()


@every_backend
def test_one_trace_per_shape(arrays, backend):
    traces = []

    @jax.jit
    def run(rows, w, group_sizes):
        traces.append(rows.shape)
        return grouped_matmul(rows, w, group_sizes, backend=backend)

    for rows, w, group_sizes, _ in zip(*arrays, strict=True):
        run(rows, w, group_sizes)
    assert traces == [(ROWS, WIDTH)]


@every_backend
def test_two_runs_give_equal_bits(arrays, backend):
    one = [array[0] for array in arrays]
    for first, second in zip(compiled(backend)(*one), compiled(backend)(*one), strict=True):
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes()


@every_backend
def test_outer_is_differentiable(arrays, backend):
    rows, w, group_sizes, dout = (array[0] for array in arrays)

    def loss(rows, dout):
        return jnp.sum(grouped_wgrad(rows, dout, group_sizes, backend=backend) * w)

    drows, ddout = jax.jit(jax.grad(loss, (0, 1)))(rows, dout)
    assert_close(drows, oracle_matmul(dout, w, group_sizes, transpose_w=True), "float32")
    assert_close(ddout, oracle_matmul(rows, w, group_sizes), "float32")
