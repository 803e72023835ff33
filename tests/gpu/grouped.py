"""Grouped matmuls on a Hopper GPU against the float64 reference, for the tests of each backend there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.grouped_matmul import (
    Epilogue,
    Operands,
    grouped_matmul,
    operand_of,
    problem,
    reference,
)
from jax_latent_moe.grouped_matmul.operands import gathered
from jax_latent_moe.grouped_matmul.registry import bind
from tests.kernels import layer_of
from tests.oracle.fused import activation_of_rows, kept_of, matmul_activation_grad
from tests.tolerances import assert_close

DEVICE = jax.devices()[0]
needs_hopper = pytest.mark.skipif(
    DEVICE.platform != "gpu" or not {"H100", "H200"} & set(DEVICE.device_kind.split()), reason="needs a Hopper GPU"
)
NUM_ROWS = 1384
# Rows of each expert: ragged; all on one expert; one row; none; blocks of 64 rows that are whole, or one row more, so
# that the second warpgroup of a tile has fewer of them, or none.
GROUPS = {
    "ragged": np.array([0, 1, 130, 0, 257, 64, 300, 63]),
    "one expert": np.array([0, 0, 0, NUM_ROWS, 0, 0, 0, 0]),
    "one row": np.array([0, 0, 0, 0, 0, 0, 0, 1]),
    "none": np.zeros(8, int),
    "blocks": np.array([64, 128, 192, 256, 320, 65, 129, 193]),
}


@functools.cache
def compiled(backend):
    @jax.jit
    def run(rows, w, dout, sizes):
        out, pullback = jax.vjp(lambda rows, w: grouped_matmul(rows, w, sizes, backend=backend), rows, w)
        return out, *pullback(dout)

    return run


def float64(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def product(backend, contraction, lhs, rhs, *more, epilogue=None):
    """What a backend (`Cutlass(config)`, `Pallas(config)`) gives for operands as they are stored."""
    w_shape = (more[0].shape[0], lhs.shape[1], rhs.shape[1]) if contraction == "wgrad" else rhs.shape
    stored = {"lhs": operand_of(lhs), "rhs": operand_of(rhs)}
    asked = problem(contraction, lhs.shape[0], w_shape, lhs.dtype, **stored, epilogue=epilogue)
    assert backend.supports(asked) is None
    return bind(backend, asked)(Operands(lhs, rhs, *more))


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="epilogue")
def jitted(backend, contraction, *operands, epilogue=None) -> dict:
    """`product` under jit, by name; columns of wider rows become an array of their own."""
    outputs = product(backend, contraction, *operands, epilogue=epilogue)
    values = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return {name: None if value is None else gathered(value) for name, value in values.items()}


def same(values, others):
    """Equal bits, NaN included."""
    for value, other in zip(jax.tree.leaves(values), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(float64(value), float64(other))


def check_fused(backend, rng, name, residual, dtype, sizes, num_rows, in_features, hidden_size):
    """Both fused products: values, those of the rounded pre-activation; exact zeros and equal bits."""
    config = layer_of(name)
    kept_epilogue = Epilogue(config.bound_activation, residual)
    total, width = int(np.sum(sizes)), hidden_size * (2 if config.gated else 1)
    shapes = (num_rows, in_features), (num_rows, in_features), (num_rows, width)
    rows, dout, pre = (rng.normal(size=shape) for shape in shapes)
    row_weights = rng.random(num_rows)
    for x in (rows, dout, pre, row_weights):
        x[total:] = np.nan
    w_in = rng.normal(size=(len(sizes), in_features, width)) / 8
    w_out = rng.normal(size=(len(sizes), hidden_size, in_features)) / 8
    kept = kept_of(config, pre, residual)
    rows, dout, kept, w_in, w_out = (jnp.asarray(x, dtype) for x in (rows, dout, kept, w_in, w_out))
    row_weights, groups = jnp.asarray(row_weights, jnp.float32), jnp.asarray(sizes, jnp.int32)

    def run():
        forward = jitted(backend, "fwd", rows, w_in, groups, epilogue=kept_epilogue)
        return forward, jitted(backend, "dgrad", dout, w_out, groups, kept, row_weights, epilogue=kept_epilogue)

    values, gradients = run()
    same((values, gradients), run())
    hidden, left = values["out"], values["residual"]
    alone = jitted(backend, "fwd", rows, w_in, groups, epilogue=dataclasses.replace(kept_epilogue, residual=None))
    assert alone["residual"] is None
    same(hidden, alone["out"])
    expected_pre = reference.grouped_matmul(float64(rows), float64(w_in), sizes)
    match residual:
        case "gate_hidden":
            same(left[:, hidden_size:], hidden)
            assert_close(float64(left[:, :hidden_size]), expected_pre[:, :hidden_size], dtype, "gate")
        case "hidden":
            same(left, hidden)
        case "pre":
            assert_close(float64(left), expected_pre, dtype, "pre")
            expected_pre = float64(left)
    # Rounded to the dtype of the rows, as the kernel rounds it before the activation.
    rounded = float64(jnp.asarray(expected_pre, dtype))
    assert_close(float64(hidden), activation_of_rows(config, rounded)[0], dtype, "hidden")

    expected = matmul_activation_grad(
        config, float64(dout), float64(w_out), sizes, float64(kept), np.asarray(row_weights, np.float64), residual
    )
    made = "out", "hidden", "row_weight_gradients"
    for label, ref in zip(made, expected, strict=True):
        assert (gradients[label] is None) == (ref is None)
        if ref is not None:
            assert_close(np.asarray(gradients[label], np.float64), ref, dtype, label)
    # Beyond the sum the gate is 0 except for what lets hidden rows tell the up half.
    zero = [hidden, *(gradients[label] for label in made)]
    for value in zero if residual == "gate_hidden" else [*zero, left]:
        assert value is None or not value[total:].any()


def check(backend, rng, dtype, sizes, num_rows, in_features, out_features):
    """Values, both gradients, exact zeros and equal bits; padding rows hold NaN."""
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
        reference.grouped_wgrad(float64(rows), float64(dout), sizes),
    )
    for value, ref in zip((out, drows, dw), expected, strict=True):
        assert_close(float64(value), ref, dtype, f"group sizes {np.asarray(sizes).tolist()}")
    assert not out[total:].any()
    assert not drows[total:].any()
    assert not dw[np.asarray(sizes) == 0].any()
    for first, again in zip((out, drows, dw), compiled(backend)(*args), strict=True):
        assert (np.asarray(first) == np.asarray(again)).all()


def check_weights_beyond_two_to_the_31_elements(backend, rng):
    """Values and gradients of the few experts that have rows, at either end of the weights; zeros for the others."""
    experts, in_features, out_features = 520, 2048, 2112
    assert experts * in_features * out_features > 2**31
    sizes = np.zeros(experts, np.int32)
    sizes[[0, 259, 518, 519]] = [3, 130, 200, 67]
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 3)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    rows, dout = draw(keys[0], (400, in_features), jnp.bfloat16), draw(keys[1], (400, out_features), jnp.bfloat16)
    w = draw(keys[2], (experts, in_features, out_features), jnp.bfloat16)
    out, drows, dw = compiled(backend)(rows, w, dout, jnp.asarray(sizes))
    start = 0
    for expert in np.flatnonzero(sizes):
        group, kernel = slice(start, start + sizes[expert]), float64(w[expert])
        assert_close(float64(out[group]), float64(rows[group]) @ kernel, "bfloat16")
        assert_close(float64(drows[group]), float64(dout[group]) @ kernel.T, "bfloat16")
        assert_close(float64(dw[expert]), float64(rows[group]).T @ float64(dout[group]), "bfloat16")
        start += sizes[expert]
    assert float(jnp.max(jnp.abs(dw[np.flatnonzero(sizes == 0)]))) == 0
