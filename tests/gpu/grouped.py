"""Grouped matmuls on a Hopper GPU against the float64 reference, for the tests of each backend there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.grouped_matmul import FusedActivation, grouped_matmul, reference
from tests.oracle.fused import activation_of_rows, kept_of, matmul_activation_grad
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


def check_fused(fusing, rng, name, dtype, sizes, num_rows, in_features, hidden_size):
    """Both fused products: values, those of the rounded pre-activation; exact zeros and equal bits."""
    activation = FusedActivation(name, *((4.0, 25.0) if name == "situ_glu" else ()))
    config = LatentMoEConfig(
        8, 4, 8, 2, 8, activation=name.removesuffix("_tanh"), gelu_approximate=name.endswith("_tanh")
    )
    total, width = int(np.sum(sizes)), hidden_size * (2 if activation.gated else 1)
    shapes = (num_rows, in_features), (num_rows, in_features), (num_rows, width)
    rows, dout, pre = (rng.normal(size=shape) for shape in shapes)
    row_weights = rng.random(num_rows)
    for x in (rows, dout, pre, row_weights):
        x[total:] = np.nan
    w_in = rng.normal(size=(len(sizes), in_features, width)) / 8
    w_out = rng.normal(size=(len(sizes), hidden_size, in_features)) / 8
    keeps_gate, kept = fusing.keeps_gate(activation), kept_of(config, pre)
    if keeps_gate:
        kept = np.concatenate([pre[:, :hidden_size], activation_of_rows(config, pre)[0]], axis=1)
    rows, dout, kept, w_in, w_out = (jnp.asarray(x, dtype) for x in (rows, dout, kept, w_in, w_out))
    row_weights, groups = jnp.asarray(row_weights, jnp.float32), jnp.asarray(sizes, jnp.int32)

    forward = jax.jit(functools.partial(fusing.matmul_activation, activation=activation), static_argnames="keep_pre")
    out, hidden = values = forward(rows, w_in, groups, keep_pre=True)
    nothing, same = forward(rows, w_in, groups, keep_pre=False)
    assert nothing is None
    expected_pre = reference.grouped_matmul(float64(rows), float64(w_in), sizes)
    if keeps_gate:
        assert hidden is None
        gate, hidden = out[:, :hidden_size], out[:, hidden_size:]
        assert_close(float64(gate), expected_pre[:, :hidden_size], dtype, "gate")
    else:
        assert_close(float64(out), expected_pre, dtype, "pre")
        expected_pre = float64(out)
    assert (np.asarray(hidden) == np.asarray(same)).all()
    assert_close(float64(hidden), activation_of_rows(config, expected_pre)[0], dtype, "hidden")
    backward = jax.jit(lambda *args: fusing.matmul_activation_grad(*args, activation=activation)[:3])
    arguments = dout, w_out, groups, kept, row_weights
    gradients = backward(*arguments)
    expected = matmul_activation_grad(
        config,
        float64(dout),
        float64(w_out),
        sizes,
        float64(kept),
        np.asarray(row_weights, np.float64),
        keeps_gate=keeps_gate,
    )
    assert [value is None for value in gradients] == [ref is None for ref in expected]
    for label, value, ref in zip(("dpre", "hidden", "drow_weights"), gradients, expected, strict=True):
        if ref is not None:
            assert_close(np.asarray(value, np.float64), ref, dtype, label)
    results = jax.tree.leaves((values, gradients))
    # Beyond the sum the gate is 0 but for what lets hidden rows tell the other half.
    for value in (hidden, *jax.tree.leaves(gradients)) if keeps_gate else results:
        assert not value[total:].any()
    again = forward(rows, w_in, groups, keep_pre=True), backward(*arguments)
    for first, second in zip(results, jax.tree.leaves(again), strict=True):
        assert (np.asarray(first) == np.asarray(second)).all()


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
