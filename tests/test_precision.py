"""Experts that multiply in FP8, against float64 loops on operands that the formats' oracle rounded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import (
    ConfigError,
    InputError,
    LatentMoEConfig,
    ParallelConfig,
    Precision,
    init_params,
    latent_moe,
    lora,
    quantize,
)
from jax_latent_moe.expert_plan import plan_experts
from jax_latent_moe.experts import routed_experts
from jax_latent_moe.grouped_matmul import Operand
from jax_latent_moe.grouped_matmul.cutlass_sm90.backend import Cutlass
from jax_latent_moe.grouped_matmul.pallas_sm90.backend import Pallas
from jax_latent_moe.grouped_matmul.xla.backend import Xla
from jax_latent_moe.routing.permute import make_dispatch_plan
from tests.kernels import H200, WHOLE
from tests.oracle.fused import activation_of_rows
from tests.oracle.rounding import LEAST_OF_ROWS, fp8
from tests.parallel.meshes import make_mesh
from tests.tolerances import relative_error

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

EXPERTS, TOKENS, K, WIDTH, INNER = 12, 21, 9, 130, 136
FP8 = "fp8_block"
EXACT = 3e-3
"""Relative error of a right result: float32 sums may round a few hidden values to a neighbouring code, 1/16 away."""


def config_of(activation, expert_bias=False, **precision):
    settings = dict(activation=activation, expert_bias=expert_bias, dtype="float32")
    return LatentMoEConfig(8, WIDTH, EXPERTS, K, INNER, precision=Precision(**precision), **settings)


def drawn(rng, config):
    """Tokens, weights of the assignments, experts' weights, expert ids (some experts have none), output gradient."""
    ids = np.stack([rng.choice(EXPERTS - 2, size=K, replace=False) for _ in range(TOKENS)]).astype(np.int32)
    columns = INNER * (2 if config.gated else 1)
    shapes = (TOKENS, WIDTH), (TOKENS, K), (EXPERTS, WIDTH, columns), (EXPERTS, INNER, WIDTH), (TOKENS, WIDTH)
    x, weights, w_in, w_out, dy = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    b_in, b_out = rng.normal(size=(EXPERTS, columns)), rng.normal(size=(EXPERTS, WIDTH))
    biases = (np.float32(b_in), np.float32(b_out)) if config.expert_bias else None
    return x, weights, w_in / 10, w_out / 10, biases, ids, dy * 1e-7


def rounded_rows(rows, format):
    return np.float64(rows) if format is None else fp8(rows, format, n_block=1, least=LEAST_OF_ROWS)


def rounded_weight(w, format, parts=1):
    """A weight [in, out] as products read it."""
    if format is None:
        return np.float64(w)
    return np.concatenate([fp8(part, format) for part in np.split(w, parts, axis=1)], axis=1)


def loop(config, x, weights, w_in, w_out, biases, ids, dy, rounding=np.float64):
    """The output y and the gradients of x, weights, w_in, w_out and biases, one assignment at a time.

    Pre-activations, hidden rows and their gradients are rounded to `rounding`. In float16 the weight multiplies what
    the gradient of the pre-activation is multiplied by, and otherwise that gradient itself.
    """
    fwd, dgrad = config.precision.fwd, config.precision.dgrad
    parts = 2 if config.gated else 1
    y, dx, dweights, dw_in, dw_out = (np.zeros(array.shape) for array in (x, x, weights, w_in, w_out))
    b_in, b_out = biases or (np.zeros((EXPERTS, w_in.shape[2])), np.zeros((EXPERTS, WIDTH)))
    db_in, db_out = np.zeros(b_in.shape), np.zeros(b_out.shape)
    up_fwd = [rounded_weight(w, fwd, parts) for w in w_in]
    down_fwd = [rounded_weight(w, fwd) for w in w_out]
    up_dgrad = [rounded_weight(w.T, dgrad) for w in w_in]
    down_dgrad = [rounded_weight(w.T, dgrad) for w in w_out]
    x_codes, dy_codes = rounded_rows(x, fwd), rounded_rows(dy, dgrad)
    for t, j in np.ndindex(ids.shape):
        e, weight = ids[t, j], np.float64(weights[t, j])
        pre = np.float64((x_codes[t] @ up_fwd[e] + b_in[e]).astype(rounding))
        hidden, slopes = activation_of_rows(config, pre[None])
        if rounding != np.float64:
            hidden = np.float64(hidden.astype(rounding))
            slopes = 2 * np.sqrt(hidden)  # relu2 keeps the hidden rows
        y[t] += weight * ((rounded_rows(hidden, fwd) @ down_fwd[e])[0] + b_out[e])
        dhidden = np.float64((dy_codes[t] @ down_dgrad[e]).astype(rounding))
        dweights[t, j] = dhidden @ hidden[0] + np.float64(dy[t]) @ b_out[e]
        before, after = (1, weight) if rounding == np.float16 else (weight, 1)
        dpre = np.float64((np.tile(before * dhidden, parts)[None] * slopes).astype(rounding))
        dx[t] += after * (rounded_rows(dpre, dgrad) @ up_dgrad[e])[0]
        dw_in[e] += np.outer(after * x[t], dpre)
        dw_out[e] += np.outer(hidden[0], weight * dy[t])
        db_in[e], db_out[e] = db_in[e] + after * dpre[0], db_out[e] + weight * dy[t]
    return y, dx, dweights, dw_in, dw_out, db_in, db_out


@pytest.mark.parametrize("expert_bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("precision", [dict(fwd=FP8), dict(fwd=FP8, dgrad=FP8)], ids=["fwd", "both"])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_values_and_gradients(rng, activation, precision, expert_bias):
    """Gradients of 1e-7, as a mean over tokens has them, do not vanish in FP8."""
    config = config_of(activation, expert_bias, **precision)
    *arrays, ids, dy = drawn(rng, config)

    def run(x, weights, w_in, w_out, biases):
        dispatch = make_dispatch_plan(jnp.asarray(ids), EXPERTS)
        experts = w_in.reshape(EXPERTS, WIDTH, -1, INNER) if config.gated else w_in
        return routed_experts(config, x, weights, experts, w_out, dispatch, biases)

    y, pullback = jax.vjp(jax.jit(run), *arrays)
    names = ("y", "x", "weights", "w_in", "w_out", "b_in", "b_out")
    found = dict(zip(names, jax.tree.leaves((y, pullback(jnp.asarray(dy)))), strict=False))
    expected = dict(zip(names, loop(config, *arrays, ids, dy), strict=True))
    dense = dict(zip(names, loop(dataclasses.replace(config, precision=Precision()), *arrays, ids, dy), strict=True))
    assert len(found) == (7 if expert_bias else 5)
    for name, value in found.items():
        assert relative_error(value, expected[name]) < EXACT, name
        if name != "b_out":
            assert 0.01 < relative_error(expected[name], dense[name]) < 0.1, f"{name}: FP8 itself"
    for name in found.keys() - {"y", "x", "weights"}:
        assert not np.asarray(found[name])[-2:].any(), "experts without tokens"


def test_quantised_params_multiply_as_codes(rng):
    """Frozen codes and dense weights give the same values. Padding tokens full of NaN change none."""
    config = dataclasses.replace(config_of("swiglu", fwd=FP8), hidden_size=24, latent_size=20)
    params = init_params(jax.random.key(0), config)
    x = rng.normal(size=(TOKENS, 24)).astype(np.float32)
    x[5] = np.nan
    mask = np.arange(TOKENS) != 5
    run = jax.jit(latent_moe, static_argnums=2)
    y, _ = run(params, x, config, token_mask=mask)
    codes = quantize(params, config, FP8)
    frozen, _ = run(codes, x, config, token_mask=mask)
    decoded, _ = run(codes, x, dataclasses.replace(config, precision=None), token_mask=mask)
    np.testing.assert_array_equal(y, frozen)
    assert 1e-3 < relative_error(frozen, decoded) < 0.1
    dx = jax.jit(jax.grad(lambda x: jnp.sum(latent_moe(codes, x, config, token_mask=mask)[0])))(x)
    assert np.isfinite(dx[mask]).all()
    assert np.asarray(dx[mask]).any()


def test_on_a_mesh(rng):
    config = dataclasses.replace(config_of("relu2", fwd=FP8, dgrad=FP8), hidden_size=24, latent_size=20)
    params = init_params(jax.random.key(0), config)
    x = rng.normal(size=(16, 24)).astype(np.float32)

    def gradients(config):
        def loss(params, x):
            return jnp.sum(latent_moe(params, x, config)[0] ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))(params, x)

    single = gradients(config)
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        spread = gradients(dataclasses.replace(config, parallel=ParallelConfig()))
    for one, other in zip(jax.tree.leaves(single), jax.tree.leaves(spread), strict=True):
        assert relative_error(other, one) < EXACT


def test_what_does_not_go_together(rng):
    with pytest.raises(ConfigError, match=r"precision.dgrad: format='int8' is for weights only: rows can be in fp8"):
        Precision(dgrad="int8")
    with pytest.raises(ConfigError, match=r"precision.fwd: format='fp9' is unknown"):
        Precision(fwd="fp9")
    config = dataclasses.replace(
        config_of("relu2", fwd=FP8), hidden_size=24, latent_size=32, expert_intermediate_size=32
    )
    params, x = init_params(jax.random.key(0), config), jnp.ones((4, 24))
    with pytest.raises(InputError, match=r"experts/w_in is in mxfp4, and precision.fwd='fp8_block'"):
        latent_moe(quantize(params, config, "mxfp4"), x, config)
    both = dataclasses.replace(config, precision=Precision(fwd=FP8, dgrad=FP8))
    with pytest.raises(InputError, match=r"precision.dgrad='fp8_block' encodes the transposed weights"):
        latent_moe(quantize(params, config, FP8), x, both)
    with pytest.raises(InputError, match="does not go with low-rank adapters"):
        latent_moe(lora.adapt(jax.random.key(1), params, config, rank=2), x, config)
    assert LatentMoEConfig.from_dict(both.to_dict()) == both


def test_second_derivatives_are_refused(rng):
    """Codes have no derivative, so a derivative of the backward pass would be wrong without an error."""
    config = dataclasses.replace(config_of("relu2", fwd=FP8), hidden_size=24, latent_size=20)
    params, x = init_params(jax.random.key(0), config), jnp.ones((4, 24))
    _, pullback = jax.vjp(lambda x: latent_moe(params, x, config)[0], x)
    with pytest.raises(InputError, match="has first derivatives in reverse mode alone: set precision=None"):
        jax.vjp(lambda dy: pullback(dy)[0], x)


def test_a_symbolic_number_of_tokens_exports(rng):
    config = dataclasses.replace(config_of("relu2", fwd=FP8, dgrad=FP8), hidden_size=24, latent_size=20)
    params = init_params(jax.random.key(0), config)
    x = rng.normal(size=(5, 24)).astype(np.float32)
    run = jax.jit(lambda params, x: latent_moe(params, x, config)[0])
    tokens = jax.ShapeDtypeStruct(jax.export.symbolic_shape("t, 24"), jnp.float32)
    exported = jax.export.export(run)(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params), tokens
    )
    assert relative_error(exported.call(params, x), run(params, x)) < EXACT


def test_a_named_kernel_serves_codes():
    """Gradients through frozen codes run on the first backend that has them."""
    config = LatentMoEConfig(512, 256, 64, 2, 512, backend="pallas", precision=Precision(fwd=FP8))
    given = dict(w_in=Operand(FP8), w_out=Operand(FP8))
    for kernels, decodes in (((), Xla), (tuple(WHOLE.kernels.items()), Cutlass)):
        device = dataclasses.replace(H200, kernels=kernels)
        plan = plan_experts(config, 4096, (64, 256, 512), (64, 512, 256), "bfloat16", device=device, **given)
        assert isinstance(plan.up_without_gradient.backend, Pallas)
        assert isinstance(plan.down.backend, Pallas)
        assert isinstance(plan.up_dgrad.backend, decodes)
