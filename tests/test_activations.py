"""Activations and their derivatives against the float64 formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.activations import activate, hidden_and_pullback
from tests.cases import DTYPES, TOY
from tests.oracle.activations import activation
from tests.tolerances import assert_close

VARIANTS = {
    "relu2": dict(activation="relu2"),
    "gelu": dict(activation="gelu"),
    "gelu-tanh": dict(activation="gelu", gelu_approximate=True),
    "swiglu": dict(activation="swiglu"),
    "geglu": dict(activation="geglu"),
    "geglu-tanh": dict(activation="geglu", gelu_approximate=True),
    "situ": dict(activation="situ_glu"),
    "situ-linear": dict(activation="situ_glu", situ_beta=1.5, situ_linear_beta=None),
    "clamped": dict(activation="clamped_swiglu"),
    "clamped-plain": dict(activation="clamped_swiglu", swiglu_alpha=1.0, swiglu_limit=2.5, swiglu_shift=0.0),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def pre_activations(rng, config, dtype):
    """[9, m] or [9, 2, m] values that dtype holds, extremes included."""
    pre = 3 * rng.normal(size=(9, 2, 5) if config.gated else (9, 5))
    pre[0], pre[1], pre[2] = 0.0, 30.0, -30.0
    return pre.astype(DTYPES[dtype])


def oracle(config, pre):
    rows = [activation(config, np.float64(row)) for row in pre]
    return np.stack([h for h, _ in rows]), np.stack([slope for _, slope in rows])


@every_variant
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_slopes(rng, variant, dtype):
    """Inside in float32 whatever the input: only the inputs are rounded."""
    config = dataclasses.replace(TOY, **VARIANTS[variant])
    pre = pre_activations(rng, config, dtype)
    hidden, slope = oracle(config, pre)
    flat = jnp.asarray(pre).reshape(9, -1)
    out, pullback = jax.vjp(lambda p: activate(p, config.bound_activation), flat)
    assert out.dtype == jnp.float32
    assert_close(out, hidden, "float32")
    (gradient,) = pullback(jnp.ones_like(out))
    assert gradient.dtype == dtype
    assert_close(gradient.reshape(pre.shape), slope, dtype)


@every_variant
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_residual_gives_values_and_slopes(rng, variant, dtype):
    """The pre-activation of each activation, and relu2's hidden rows as rounded."""
    config = dataclasses.replace(TOY, **VARIANTS[variant])
    activation, pre = config.bound_activation, pre_activations(rng, config, dtype)
    hidden, slope = oracle(config, pre)
    for residual, kept, tolerance in (("pre", pre, "float32"), ("hidden", hidden, dtype)):
        if residual in activation.definition.residuals:
            value, pull = hidden_and_pullback(jnp.asarray(kept.reshape(9, -1), dtype), residual, activation)
            gradient = pull(jnp.ones_like(value))
            assert value.dtype == gradient.dtype == jnp.float32
            assert_close(value, hidden, tolerance, residual)
            assert_close(gradient.reshape(pre.shape), slope, tolerance, residual)


def test_the_residual_is_the_smallest_that_the_gradient_can_be_made_of():
    kept = {
        variant: dataclasses.replace(TOY, **fields).bound_activation.definition.residuals
        for variant, fields in VARIANTS.items()
    }
    gate = "gate_hidden", "pre"
    assert kept == {
        "relu2": ("hidden", "pre"),
        "gelu": ("pre",),
        "gelu-tanh": ("pre",),
        "swiglu": gate,
        "geglu": gate,
        "geglu-tanh": gate,
        "situ": ("pre",),
        "situ-linear": ("pre",),
        "clamped": ("pre",),
        "clamped-plain": ("pre",),
    }


def test_the_slope_of_hidden_rows_can_be_differentiated_at_zero():
    """The root's own derivative is infinite there, and a second derivative would be NaN."""

    def slope(hidden):
        return hidden_and_pullback(hidden, "hidden", TOY.bound_activation)[1](jnp.ones_like(hidden)).sum()

    assert TOY.activation == "relu2"
    np.testing.assert_array_equal(jax.grad(slope)(jnp.array([0.0, 1.0, 4.0])), [0.0, 1.0, 0.5])


@every_variant
def test_float64(rng, variant):
    config = dataclasses.replace(TOY, **VARIANTS[variant])
    pre = pre_activations(rng, config, "float64")
    with jax.enable_x64(True):
        out = activate(jnp.asarray(pre).reshape(9, -1), config.bound_activation)
        assert out.dtype == jnp.float64
        assert_close(out, oracle(config, pre)[0], "float64")


def test_gelu_is_exact_unless_asked():
    """gelu(1) = Phi(1): its tanh form is off in the fourth digit."""
    exact, approximate = (
        float(activate(jnp.ones(1), dataclasses.replace(TOY, **VARIANTS[v]).bound_activation)[0])
        for v in ("gelu", "gelu-tanh")
    )
    assert exact == pytest.approx(0.8413447, abs=1e-6)
    assert approximate == pytest.approx(0.8411920, abs=1e-6)


def test_a_value_at_the_limit_of_a_clamp_has_a_gradient():
    """As torch.clamp gives it one; bfloat16 holds the limits of released models exactly."""
    clamped = dataclasses.replace(TOY, activation="clamped_swiglu").bound_activation
    at, beyond = jnp.array([7.0, -7.0], "bfloat16"), jnp.array([7.03125, -7.03125], "bfloat16")
    slopes = [jax.grad(lambda pre: activate(pre, clamped)[0])(pre) for pre in (at, beyond)]
    assert np.asarray(slopes[0]).all()
    np.testing.assert_array_equal(slopes[1], 0)


def test_the_gate_is_the_first_half():
    pre = jnp.array([-30.0, -30.0, 2.0, 3.0])
    assert not np.asarray(activate(pre, dataclasses.replace(TOY, activation="geglu").bound_activation)).any()
