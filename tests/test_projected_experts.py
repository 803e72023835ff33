"""The experts of one token and the up-projection in one call, emulated on the CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_latent_moe import (
    RouterConfig,
    XlaBackend,
    experts,
    init_params,
    latent_moe,
    native,
    projections,
)
from jax_latent_moe.decode import Decode, decoded_experts, plan_decode
from jax_latent_moe.grouped_matmul.sm90 import kernel_activation
from jax_latent_moe.routing.permute import make_dispatch_plan
from tests import emulated
from tests.few_tokens import SMALL, expected, experts_of, layer, only, use_small
from tests.tolerances import assert_close

TARGET = "latent_moe_decode_projections"
emulates = pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")


@pytest.fixture
def emulation(monkeypatch, install_library):
    """The kernels run on the CPU, as if it were a Hopper GPU with a library."""
    monkeypatch.setattr(native, "call", emulated.call)
    use_small(monkeypatch)


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(("format", "dtype"), [(None, "bfloat16"), (None, "float16"), ("mxfp4", "bfloat16")])
@pytest.mark.parametrize("parts", projections.PARTS)
def test_values(rng, format, dtype, parts):
    """Those of two calls, to the bit, and those of float64. Sizes that no tile divides, and an id that is no expert."""
    config = layer("relu2", 96, 12, 12, 160)
    w_in, w_out = experts_of(rng, config, format, dtype)
    ids = np.asarray([[3, 0, 8, 3, -1, 1, 2, 12, 4, 5, 6, 0]], np.int32)
    w_in, w_out = only(w_in, ids), only(w_out, ids)
    x, weights, up_proj = (rng.normal(size=shape) for shape in ((1, 96), (1, 12), (96, 136)))
    x, weights, up_proj = jnp.asarray(x, dtype), jnp.asarray(weights, jnp.float32), jnp.asarray(up_proj / 10, dtype)
    plan = plan_decode(config, 1, 12, dtype, w_in, w_out, device=SMALL)
    assert isinstance(plan, Decode), plan
    arguments = plan, x, weights, jnp.asarray(ids), w_in, w_out
    y = decoded_experts(*arguments, up_proj, parts)
    assert (y.shape, y.dtype) == ((1, 136), dtype)
    apart = projections.projection(config, decoded_experts(*arguments), up_proj)
    if parts == projections.cluster_parts(up_proj):
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(apart, np.float32))
    wanted = expected(config, x, weights, ids, w_in, w_out) @ np.asarray(up_proj, np.float64)
    assert_close(np.asarray(y, np.float64), wanted, dtype)


def small_layer(**changes):
    # A bias of the logits comes between the kernels, so one call does not run them all (tests/test_one_token.py).
    router = RouterConfig(routed_scaling_factor=2.5, logit_bias=True)
    config = layer("relu2", 32, 16, 9, 32, router=router, dtype="bfloat16", param_dtype="bfloat16")
    return dataclasses.replace(config, **changes)


@emulates
@pytest.mark.usefixtures("emulation")
def test_a_layer(rng):
    """As the portable backend computes it."""
    config, x = small_layer(), jnp.asarray(rng.normal(size=(1, 64)), jnp.bfloat16)
    params = init_params(jax.random.key(0), config)
    y, aux = jax.jit(latent_moe, static_argnums=2)(params, x, config)
    wanted, portable = latent_moe(params, x, dataclasses.replace(config, backend=XlaBackend()))
    np.testing.assert_array_equal(aux.expert_ids, portable.expert_ids)
    assert_close(np.asarray(y, np.float64), np.asarray(wanted, np.float64), "bfloat16")


def test_gradients(rng, monkeypatch):
    """Those of the experts and a product behind them, and exactly zero for an expert without tokens."""
    config = dataclasses.replace(small_layer(), backend=XlaBackend())
    shapes = (1, 32), (1, 9), (16, 32, 40), (16, 40, 32), (32, 64)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    ids = jnp.arange(9, dtype=jnp.int32)[None] + 2
    dy = jnp.asarray(rng.normal(size=(1, 64)), jnp.float32)

    def loss(x, weights, w_in, w_out, up_proj):
        dispatch = make_dispatch_plan(ids, 16)
        y = experts.routed_experts(config, x, weights, w_in, w_out, dispatch, up_proj=up_proj)
        return jnp.sum(jnp.sin(y) * dy)

    gradient = jax.grad(loss, argnums=tuple(range(5)))
    apart = gradient(*arrays)
    activation = kernel_activation(config.bound_activation)
    assert activation is not None
    monkeypatch.setattr(experts, "plan_decode", lambda *_: Decode(1, 9, activation, "dense", "dense", 1))
    monkeypatch.setattr(experts, "refusal_of_projections", lambda *_: None)
    monkeypatch.setattr(experts, "cluster_parts", lambda *_: 1)
    assert "latent_moe_decode_experts" in str(jax.make_jaxpr(loss)(*arrays))
    together = gradient(*arrays)
    jax.tree.map(np.testing.assert_array_equal, together, apart)
    assert (np.asarray(together[2])[[0, 1, 11, 15]] == 0).all()
    assert np.asarray(together[4]).any()


WAYS = {
    "one token": (1, {}, 1),
    "two tokens": (2, {}, 0),
    "a norm in between": (1, dict(latent_norm="post"), 2),
    "a factor in between": (1, dict(apply_routed_scale_to_output=True), 2),
    "no latents": (1, dict(latent_size=None), 1),
}


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("name", WAYS)
def test_how_many_calls_multiply_projections_alone(name, monkeypatch):
    tokens, changes, calls = WAYS[name]
    use_small(monkeypatch)
    config = small_layer(**changes)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    x = jax.ShapeDtypeStruct((tokens, 64), jnp.bfloat16)
    program = str(jax.make_jaxpr(lambda params, x: latent_moe(params, x, config)[0])(params, x))
    assert program.count(TARGET) == calls
    assert program.count("latent_moe_decode_experts") == 1


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("changes", [{}, dict(latent_norm="post"), dict(latent_size=None)])
def test_a_scan_in_a_shard_map(changes, monkeypatch):
    """The carry keeps its type, which says over which axes of the mesh it varies."""
    use_small(monkeypatch)
    config = small_layer(**changes)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def steps(params, x):
        return jax.lax.scan(lambda x, _: (latent_moe(params, x, config)[0], None), x, None, length=2)[0]

    mapped = jax.shard_map(steps, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P("batch"))
    program = str(jax.make_jaxpr(mapped)(params, jax.ShapeDtypeStruct((2, 64), jnp.bfloat16)))
    assert "latent_moe_decode_experts" in program
