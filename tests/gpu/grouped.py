"""Grouped matmuls on a Hopper GPU against the float64 reference, for the tests of each backend there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.expert_plan import plan_experts
from jax_latent_moe.grouped_matmul import (
    Epilogue,
    Operands,
    grouped_matmul,
    operand_of,
    problem,
    reference,
    select,
)
from jax_latent_moe.grouped_matmul.operands import gathered
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


def run_product(
    backend, contraction, lhs, rhs, groups, *, epilogue=None, tile=None, in_place=None, kept=None, row_weights=None
):
    """The outputs of one product by one backend, as arrays by name; a tile, or what is gathered where, may be given."""
    w_shape = rhs.shape if contraction != "wgrad" else (groups.shape[0], lhs.shape[1], rhs.shape[1])
    right = operand_of(rhs) if contraction == "wgrad" else None
    asked = problem(contraction, lhs.shape[0], w_shape, lhs.dtype, lhs=operand_of(lhs), rhs=right, epilogue=epilogue)
    bound = select(asked, backend)
    changes = {"tile": tile, "in_place": in_place}
    bound = dataclasses.replace(bound, **{name: value for name, value in changes.items() if value is not None})
    outputs = bound(Operands(lhs, rhs, groups, kept, row_weights))
    found = {
        name: getattr(outputs, name) for name in ("out", "residual", "hidden", "row_weight_gradients", "lhs", "rhs")
    }
    return {name: gathered(value) for name, value in found.items() if value is not None}


def bound_activation(name):
    """A registered activation by the name that kernels have for it, and a config of it."""
    fields = {"activation": name.removesuffix("_tanh")}
    if "gelu" in name or "geglu" in name:
        fields["gelu_approximate"] = name.endswith("_tanh")
    config = LatentMoEConfig(8, 4, 8, 2, 8, **fields)
    return config.bound_activation, config


def check_fused(backend, rng, name, dtype, sizes, num_rows, in_features, hidden_size):
    """Both fused products: values, those of the rounded pre-activation; exact zeros and equal bits."""
    activation, config = bound_activation(name)
    total, width = int(np.sum(sizes)), hidden_size * (2 if activation.gated else 1)
    shapes = (num_rows, in_features), (num_rows, in_features), (num_rows, width)
    rows, dout, pre = (rng.normal(size=shape) for shape in shapes)
    row_weights = rng.random(num_rows)
    for x in (rows, dout, pre, row_weights):
        x[total:] = np.nan
    w_in = rng.normal(size=(len(sizes), in_features, width)) / 8
    w_out = rng.normal(size=(len(sizes), hidden_size, in_features)) / 8
    plan = plan_experts(
        dataclasses.replace(config, backend=backend), num_rows, w_in.shape, w_out.shape, jnp.dtype(dtype)
    )
    residual, kept = plan.residual, kept_of(config, pre)
    assert plan.up.problem.epilogue == plan.down_dgrad.problem.epilogue == Epilogue(activation, residual)
    keeps_gate = residual == "gate_hidden"
    if keeps_gate:
        kept = np.concatenate([pre[:, :hidden_size], activation_of_rows(config, pre)[0]], axis=1)
    rows, dout, kept, w_in, w_out = (jnp.asarray(x, dtype) for x in (rows, dout, kept, w_in, w_out))
    row_weights, groups = jnp.asarray(row_weights, jnp.float32), jnp.asarray(sizes, jnp.int32)

    def forward(residual):
        product = functools.partial(run_product, backend, "fwd", epilogue=Epilogue(activation, residual))
        return jax.jit(product)(rows, w_in, groups)

    values, without = forward(residual), forward(None)
    assert "residual" not in without
    hidden, out = values["out"], values["residual"]
    expected_pre = reference.grouped_matmul(float64(rows), float64(w_in), sizes)
    if keeps_gate:
        assert_close(float64(out[:, :hidden_size]), expected_pre[:, :hidden_size], dtype, "gate")
        assert (np.asarray(hidden) == np.asarray(out[:, hidden_size:])).all()
    elif residual == "pre":
        assert_close(float64(out), expected_pre, dtype, "pre")
        expected_pre = float64(out)
    assert (np.asarray(hidden) == np.asarray(without["out"])).all()
    assert_close(float64(hidden), activation_of_rows(config, expected_pre)[0], dtype, "hidden")
    product = functools.partial(run_product, backend, "dgrad", epilogue=Epilogue(activation, residual))
    backward = jax.jit(lambda dout, w, groups, kept, weights: product(dout, w, groups, kept=kept, row_weights=weights))
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
    found = [gradients.get(name) for name in ("out", "hidden", "row_weight_gradients")]
    assert [value is None for value in found] == [ref is None for ref in expected]
    for label, value, ref in zip(("dpre", "hidden", "drow_weights"), found, expected, strict=True):
        if ref is not None:
            assert_close(np.asarray(value, np.float64), ref, dtype, label)
            assert not value[total:].any()
    # Beyond the sum the gate is 0 but for what makes hidden rows determine the up half.
    for value in (hidden, *([] if keeps_gate else [out])):
        assert not value[total:].any()
    for first, second in zip(
        jax.tree.leaves((values, gradients)), jax.tree.leaves((forward(residual), backward(*arguments))), strict=True
    ):
        np.testing.assert_array_equal(float64(first)[:total], float64(second)[:total])


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
