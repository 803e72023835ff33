"""Values and gradients of every row against a float64 loop over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.config import XlaBackend
from jax_latent_moe.grouped_matmul import grouped_matmul, reference
from tests.conformance import suite
from tests.conformance.oracle import compiled, oracle_run, random_group_sizes
from tests.conformance.rows import Row, every_row, few_cells
from tests.tolerances import assert_close

EXPERTS, ROWS = suite.EXPERTS, suite.ROWS
XLA = Row("xla", XlaBackend())


@few_cells
def test_random_groups(rng, row):
    suite.check_random_groups(row, rng)


@every_row
def test_sizes_that_no_block_divides(rng, row):
    suite.check_sizes_that_no_block_divides(row, rng)


@every_row
def test_every_pattern_of_empty_experts(rng, row):
    suite.check_every_pattern_of_empty_experts(row, rng)


@every_row
def test_all_rows_on_one_expert(rng, row):
    suite.check_all_rows_on_one_expert(row, rng)


@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # interpreted, values are multiplied and cleared later
@few_cells
def test_padding_rows_leak_nowhere(rng, row):
    suite.check_padding_rows_leak_nowhere(row, rng)


@every_row
def test_a_nan_row_poisons_its_own_row_alone(rng, row):
    suite.check_a_nan_row_poisons_its_own_row_alone(row, rng)


@few_cells
def test_group_sizes_are_cut_under_jit(rng, row):
    suite.check_group_sizes_are_cut_under_jit(row, rng)


@every_row
def test_two_runs_give_equal_bits(rng, row):
    suite.check_two_runs_give_equal_bits(row, rng)


@every_row
def test_an_expert_whose_weights_are_nan_spoils_its_own_rows_alone(rng, row):
    """`ragged_dot` multiplies the weights of all experts where no TPU runs it: docs/backends.md says so."""
    rows, w, dout = suite.draw(row, rng)
    sizes = np.full(EXPERTS, ROWS // EXPERTS, np.int32)
    expected = oracle_run(rows, row.values(w), sizes, dout)["out"]
    w[2] = np.nan
    out = np.float64(compiled(row)(rows, w, sizes, dout)["out"])
    if not row.isolates and jax.default_backend() != "tpu":
        assert np.isnan(out).all(axis=1).all()
        return
    own = np.repeat(np.arange(EXPERTS), sizes) == 2
    assert np.isnan(out[own]).all()
    assert_close(out[~own], expected[~own], row.dtype)


@pytest.mark.parametrize("method", ["blocked", "ragged_dot"])
def test_float64(rng, method):
    with jax.enable_x64(True):
        row = Row("x64", XlaBackend(method=method), ("float64",))
        rows, w, dout = (rng.normal(size=shape) for shape in ((ROWS, 5), (EXPERTS, 5, 7), (ROWS, 7)))
        suite.check(row, rows, w, random_group_sizes(rng, EXPERTS, ROWS), dout)


@every_row
def test_second_derivative(rng, row):
    """The gradient of a gradient: both rules differentiate through each other."""
    rows, w, dout = suite.draw(row, rng)
    group_sizes = random_group_sizes(rng, EXPERTS, ROWS - 2)

    def gradient_norm(matmul, dtype):
        def loss(rows, w):
            return jnp.sum(jnp.square(matmul(rows, w).astype(jnp.float32)) * dout.astype(np.float32)) / rows.shape[1]

        def norm(rows, w):
            return sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.grad(loss, (0, 1))(rows, w))

        return jax.jit(jax.grad(norm, (0, 1)))(jnp.asarray(rows, dtype), jnp.asarray(w, dtype))

    experts = np.repeat(np.arange(EXPERTS + 1), [*group_sizes, 2])
    one_hot = np.eye(EXPERTS + 1, dtype=np.float32)[experts, :EXPERTS]
    ours = gradient_norm(lambda rows, w: grouped_matmul(rows, w, group_sizes, backend=row.backend), row.dtype)
    dense = gradient_norm(lambda rows, w: jnp.einsum("rk,ekn,re->rn", rows, w, one_hot), "float32")
    for value, wanted in zip(ours, dense, strict=True):
        assert_close(value, wanted, row.dtype)


@pytest.mark.parametrize("transpose_w", [False, True])
def test_shipped_reference_agrees(rng, transpose_w):
    rows, w, dout = suite.draw(XLA, rng, transpose_w=transpose_w)
    group_sizes = random_group_sizes(rng, EXPERTS, ROWS - 3)
    expected = oracle_run(rows, w, group_sizes, dout, transpose_w)
    shipped = reference.grouped_matmul(rows, w, group_sizes, transpose_w=transpose_w)
    assert_close(shipped, expected["out"], "float64")
    assert_close(reference.grouped_wgrad(rows, dout, group_sizes), expected["wgrad"], "float64")
