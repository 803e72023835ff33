"""`jax_latent_moe.ragged_dot`: the cases of JAX's own tests of `jax.lax.ragged_dot`, against a float64 loop.

The cases are from jax-ml/jax, tests/lax_test.py (RaggedTest), tests/export_test.py and tests/shape_poly_test.py.
"""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_latent_moe import InputError, PallasBackend, UnsupportedError, XlaBackend, ragged_dot
from tests.conformance.oracle import oracle_matmul, oracle_wgrad
from tests.conformance.rows import EVERY_CELL, InterpretedPallas
from tests.tolerances import assert_close

INTERPRETED = pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels are interpreted on a CPU")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": np.float64}


def draw(rng, m, k, n, groups, dtype="float32"):
    """lhs, rhs and group sizes that add up to m, as JAX's tests draw them: some groups may be empty."""
    ends = np.append(np.sort(rng.choice(m, size=groups - 1)), m)
    lhs, rhs = rng.normal(size=(m, k)), rng.normal(size=(groups, k, n))
    return lhs.astype(DTYPES[dtype]), rhs.astype(DTYPES[dtype]), np.diff(ends, prepend=0).astype(np.int32)


@functools.cache
def compiled(backend):
    @jax.jit
    def run(lhs, rhs, group_sizes, dout):
        out, pullback = jax.vjp(lambda lhs, rhs: ragged_dot(lhs, rhs, group_sizes, backend=backend), lhs, rhs)
        return out, *pullback(dout)

    return run


def check(lhs, rhs, group_sizes, dtype="float32", backend="auto"):
    """The value and both gradients against the oracle."""
    total, dout = int(group_sizes.sum()), np.ones((lhs.shape[0], rhs.shape[2]), lhs.dtype)
    lhs[total:] = dout[total:] = np.nan
    out, dlhs, drhs = compiled(backend)(lhs, rhs, group_sizes, dout)
    assert (out.dtype, dlhs.dtype, drhs.dtype) == (lhs.dtype,) * 3
    lhs[total:] = dout[total:] = 0
    assert_close(out, oracle_matmul(lhs, rhs, group_sizes), dtype, "out")
    assert_close(dlhs, oracle_matmul(dout, rhs, group_sizes, transpose_w=True), dtype, "gradient of lhs")
    assert_close(drhs, oracle_wgrad(lhs, dout, group_sizes), dtype, "gradient of rhs")
    assert not np.asarray(drhs)[group_sizes == 0].any()
    assert not np.asarray(out)[total:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n", "groups"), [(64, 4, 3, 1), (64, 9, 8, 2)])
def test_random_groups(rng, dtype, m, k, n, groups):
    with jax.enable_x64(dtype == "float64"):
        check(*draw(rng, m, k, n, groups, dtype), dtype)


def test_on_jax_own_ragged_dot(rng):
    check(*draw(rng, 16, 4, 3, 2), backend=XlaBackend(method="ragged_dot"))


@pytest.mark.parametrize(("m", "k", "n", "groups"), [(5, 4, 3, 1), (5, 4, 3, 2), (9, 4, 3, 1), (10, 9, 8, 2)])
def test_fewer_rows_in_groups_than_there_are(rng, m, k, n, groups):
    check(*draw(rng, m, k, n, groups)[:2], np.ones(groups, np.int32))


@pytest.mark.parametrize(("m", "k", "n"), [(5, 0, 3), (5, 4, 0), (0, 4, 3)])
def test_no_features_or_rows(rng, m, k, n):
    """A sum over nothing is 0."""
    sizes = np.array([m // 2, m - m // 2], np.int32)
    out = ragged_dot(np.ones((m, k), np.float32), np.ones((2, k, n), np.float32), sizes)
    np.testing.assert_array_equal(out, np.full((m, n), k))


def test_64_bits_are_asked_for_where_jax_has_them(rng):
    with pytest.raises(InputError, match="preferred_element_type=float64 needs JAX's 64-bit types"):
        ragged_dot(*draw(rng, 4, 3, 2, 1), preferred_element_type=np.float64)


@pytest.mark.parametrize("sizes", [(1, 0, 0), (0, 12, 0), (5, 0, 7), (0, 0, 0)])
def test_empty_groups(rng, sizes):
    check(*draw(rng, 12, 6, 5, 3)[:2], np.array(sizes, np.int32))


def test_one_row(rng):
    check(*draw(rng, 1, 6, 5, 3)[:2], np.array([0, 1, 0], np.int32))


@INTERPRETED
def test_an_interpreted_kernel(rng):
    lhs, rhs, sizes = draw(rng, 16, 64, 64, 2, "bfloat16")
    assert_close(ragged_dot(lhs, rhs, sizes, backend=InterpretedPallas()), oracle_matmul(lhs, rhs, sizes), "bfloat16")


@INTERPRETED
@pytest.mark.skipif(not EVERY_CELL, reason="JAX_LATENT_MOE_EVERY_CELL=1 interprets it")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("m", "groups"), [(64, 1), (64, 2), (16, 2), (5, 2)])
def test_gradients_of_interpreted_kernels(rng, m, groups, dtype):
    check(*draw(rng, m, 64, 64, groups, dtype), dtype, backend=InterpretedPallas())


@pytest.mark.parametrize("groups", [2, 4])
def test_vmap(rng, groups):
    batch = [draw(rng, 128, 32, 64, groups) for _ in range(3)]
    lhs, rhs, sizes = (np.stack(arrays) for arrays in zip(*batch, strict=True))
    dot = functools.partial(ragged_dot, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    for out, one in zip(jax.vmap(dot)(lhs, rhs, sizes), batch, strict=True):
        assert_close(out, oracle_matmul(*one), "float32")


def test_vmap_over_one_argument_which_jax_refuses(rng):
    lhs, rhs, sizes = draw(rng, 16, 4, 3, 2)
    many = np.stack([lhs, 2 * lhs])
    for out, one in zip(jax.vmap(ragged_dot, in_axes=(0, None, None))(many, rhs, sizes), many, strict=True):
        assert_close(out, oracle_matmul(one, rhs, sizes), "float32")


@pytest.mark.parametrize(("given", "asked"), [("float16", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_preferred_element_type(rng, given, asked):
    """A wider result is not rounded to the operands' dtype on its way, nor is a product of float16 above 65504."""
    lhs, rhs, sizes = draw(rng, 11, 5, 7, 3, given)
    out = ragged_dot(lhs, rhs, sizes, preferred_element_type=asked)
    assert out.dtype == asked
    assert_close(out, oracle_matmul(lhs, rhs, sizes), asked)
    large = ragged_dot(np.full((2, 4), 300, np.float16), np.full((1, 4, 2), 300, np.float16), [2], None, jnp.bfloat16)
    assert_close(large, np.full((2, 2), 360000.0), "bfloat16")


def test_preferred_element_type_has_gradients_in_the_operands_dtypes(rng):
    lhs, rhs, sizes = draw(rng, 11, 5, 7, 3, "bfloat16")
    loss = lambda lhs, rhs: jnp.sum(ragged_dot(lhs, rhs, sizes, preferred_element_type=jnp.float32))  # noqa: E731
    dlhs, drhs = jax.grad(loss, (0, 1))(lhs, rhs)
    assert dlhs.dtype == drhs.dtype == jnp.bfloat16
    ones = np.ones((11, 7))
    assert_close(dlhs, oracle_matmul(ones, rhs, sizes, transpose_w=True), "bfloat16")
    assert_close(drhs, oracle_wgrad(lhs, ones, sizes), "bfloat16")


def test_precision_reaches_every_derivative(rng):
    lhs, rhs, sizes = draw(rng, 6, 4, 3, 2)

    def third_order(lhs, rhs, precision):
        def loss(lhs, rhs):
            return jnp.sum(ragged_dot(lhs, rhs, sizes, precision) ** 2)

        gradient = jax.grad(loss, (0, 1))
        return jax.grad(lambda lhs, rhs: sum(jnp.sum(part**2) for part in gradient(lhs, rhs)), (0, 1))(lhs, rhs)

    def precisions(precision):
        jaxpr = jax.make_jaxpr(functools.partial(third_order, precision=precision))(lhs, rhs)
        return set(re.findall(r"precision=(\(.*?\)|\S+)", str(jaxpr)))

    (highest,) = precisions("highest")
    assert "HIGHEST" in highest
    (high,) = precisions(jax.lax.Precision.HIGH)
    assert "HIGHEST" not in high
    with jax.default_matmul_precision("highest"):
        assert precisions(None) == {highest}
        assert precisions("high") == {high}


@pytest.mark.parametrize(("m", "k", "n", "sizes"), [(64, 4, 3, [64]), (64, 9, 8, [30, 34])])
def test_export(rng, m, k, n, sizes):
    lhs, rhs, _ = draw(rng, m, k, n, len(sizes))
    sizes = np.array(sizes, np.int32)
    exported = jax.export.export(jax.jit(ragged_dot))(lhs, rhs, sizes)
    assert_close(exported.call(lhs, rhs, sizes), oracle_matmul(lhs, rhs, sizes), "float32")


@pytest.mark.parametrize(("given", "asked"), [("float32", None), ("float16", "float32")])
def test_export_with_symbolic_sizes(rng, given, asked):
    m, k, n = jax.export.symbolic_shape("m, k, n")
    dtype = DTYPES[given]
    shapes = (
        jax.ShapeDtypeStruct((m, k), dtype),
        jax.ShapeDtypeStruct((3, k, n), dtype),
        jax.ShapeDtypeStruct((3,), np.int32),
    )
    exported = jax.export.export(jax.jit(functools.partial(ragged_dot, preferred_element_type=asked)))(*shapes)
    lhs, rhs, _ = draw(rng, 11, 5, 7, 3, given)
    sizes = np.array([4, 4, 3], np.int32)
    assert_close(exported.call(lhs, rhs, sizes), oracle_matmul(lhs, rhs, sizes), asked or given)


X, W, SIZES = np.ones((5, 4), np.float32), np.ones((2, 4, 3), np.float32), np.array([3, 2], np.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_offset": 1}, "group_offset=1 must be None: slice"),
        ({"out_sharding": jax.P()}, "must be None: give the result to jax.lax.with_sharding_constraint"),
        ({"lhs": X[0]}, "lhs of shape (4,) and rhs of shape (2, 4, 3) must be [m, k] and [g, k, n]"),
        ({"lhs": X[:, :3]}, "lhs of shape (5, 3) and rhs of shape (2, 4, 3) must be [m, k] and [g, k, n]"),
        ({"rhs": W[0]}, "rhs of shape (4, 3) must be"),
        ({"rhs": W.astype(np.float16)}, "rhs of dtype float16 must have the same: cast one first"),
        ({"lhs": X.astype(np.int32), "rhs": W.astype(np.int32)}, "must both be floating"),
        ({"preferred_element_type": jnp.int32}, "a result of dtype int32 must both be floating"),
        ({"precision": jax.lax.DotAlgorithmPreset.F32_F32_F32}, "must be None, a jax.lax.Precision or its name"),
        ({"precision": ("high", "high")}, "algorithms and pairs are not supported"),
        ({"group_sizes": SIZES[:1]}, "group_sizes of shape (1,) must be of shape [2]"),
        ({"group_sizes": SIZES.astype(np.float32)}, "must be integers"),
        ({"group_sizes": np.array([5, 5])}, "add up to 10, more than the 5 rows"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ragged_dot(**{"lhs": X, "rhs": W, "group_sizes": SIZES, **arguments})


def test_a_named_backend_runs_or_refuses():
    with pytest.raises(UnsupportedError, match="backend 'pallas' cannot run this"):
        ragged_dot(X, W, SIZES, backend=PallasBackend())


def test_forward_mode_is_refused_by_jax():
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda lhs: ragged_dot(lhs, W, SIZES), (X,), (X,))
