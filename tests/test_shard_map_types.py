"""Experts and their gradients inside of a user's own `shard_map`, which types what varies over its axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_latent_moe import (
    CutlassBackend,
    PallasBackend,
    RouterConfig,
    XlaBackend,
    decode,
    expert_plan,
    init_params,
    latent_moe,
    native,
    projections,
)
from jax_latent_moe.experts import routed_experts
from jax_latent_moe.routing.permute import make_dispatch_plan
from jax_latent_moe.varying import _varying_axes
from tests import emulated
from tests.few_tokens import BACKEND, layer
from tests.kernels import H100
from tests.oracle.experts import routed
from tests.tolerances import assert_close

EXPERTS, K, LATENT, INNER = 16, 9, 128, 64
ROUTER = RouterConfig(routed_scaling_factor=2.5)
# By name: the backend, and what its program calls.
CALLS = {
    "few tokens": (BACKEND, "latent_moe_matmul_activation"),
    "cutlass": (CutlassBackend(decode="never"), "latent_moe_matmul_activation"),
    "pallas": (PallasBackend(), "wgmma_wait"),
    "xla": (XlaBackend(), "scan"),
}


def config_of(**changes):
    config = layer("relu2", LATENT, EXPERTS, K, INNER, router=ROUTER, dtype="bfloat16", param_dtype="bfloat16")
    return dataclasses.replace(config, **changes)


def mesh_of_two():
    return jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("split", ["tokens", "parameters", "both"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_one_token_have_the_types_of_their_values(monkeypatch, name, split):
    """Traced as for a Hopper GPU: kernels may not say that their results are equal on all devices."""
    for module in (decode, expert_plan, projections):
        monkeypatch.setattr(module, "current_device", lambda: H100)
    backend, target = CALLS[name]
    config = config_of(backend=backend)
    params = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[None], init_params(jax.random.key(0), config)))
    of_params, of_x = P() if split == "tokens" else P("i"), P() if split == "parameters" else P("i")

    def local(params, x):
        def loss(params, x):
            y, _ = latent_moe(jax.tree.map(lambda leaf: leaf[0], params), x, config)
            return jnp.sum(y.astype(jnp.float32))

        gradients = jax.grad(loss, (0, 1))(params, x)
        types = jax.tree.map(lambda value, of: _varying_axes(value) == _varying_axes(of), gradients, (params, x))
        assert all(jax.tree.leaves(types))
        return gradients

    if of_params == P("i"):
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype), params)
    x = jax.ShapeDtypeStruct((2 if of_x == P("i") else 1, 64), jnp.bfloat16)
    program = jax.shard_map(local, mesh=mesh_of_two(), in_specs=(of_params, of_x), out_specs=(of_params, of_x))
    assert target in str(jax.make_jaxpr(program)(params, x))


NAMES = ("ids", "tokens", "weights", "w_in", "w_out")


@pytest.mark.parametrize("split", [("ids",), ("tokens",), ("weights",), ("w_in",), ("w_out", "ids"), NAMES])
def test_any_of_the_arrays_may_vary(rng, split):
    """An array's gradient is its own where it varies, and the sum over the devices where it does not."""
    config = config_of(dtype="float32", param_dtype="float32", backend=XlaBackend())
    shapes = (1, 12), (1, K), (EXPERTS, 12, 20), (EXPERTS, 20, 12)
    ids = [rng.permutation(EXPERTS - 1)[None, :K].astype(np.int32) for _ in range(2)]
    values = [(own, *(rng.normal(size=shape).astype(np.float32) for shape in shapes)) for own in ids]
    parts = [
        {name: values[part if name in split else 0][place] for place, name in enumerate(NAMES)} for part in range(2)
    ]
    given = [np.concatenate([part[name] for part in parts]) if name in split else parts[0][name] for name in NAMES]
    dout = rng.normal(size=(1, 12)).astype(np.float32)

    def local(ids, *arrays):
        def loss(*arrays):
            out = routed_experts(config, *arrays, dispatch=make_dispatch_plan(ids, EXPERTS))
            return jnp.sum(out * dout)

        return jax.grad(loss, (0, 1, 2, 3))(*arrays)

    specs = tuple(P("i") if name in split else P() for name in NAMES)
    program = jax.shard_map(local, mesh=mesh_of_two(), in_specs=specs, out_specs=specs[1:])
    found = jax.jit(program)(*given)
    alone = [routed(config, **own, dout=dout) for own in parts]
    for name, gradient in zip(NAMES[1:], found, strict=True):
        own = [gradients[name] for gradients in alone]
        assert_close(gradient, np.concatenate(own) if name in split else sum(own), "float32", name)
    unused = np.setdiff1d(np.arange(EXPERTS), np.concatenate(ids))
    assert unused.size
    assert not np.asarray(found[2])[unused].any()


@pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")
def test_two_devices_run_the_kernels_at_once(rng, monkeypatch, install_library):
    """A layer's values are those that one device computes of each token, to the bit."""
    monkeypatch.setattr(native, "call", emulated.call)
    for module in (decode, expert_plan, projections):
        monkeypatch.setattr(module, "current_device", lambda: H100)
    config = config_of()
    params = init_params(jax.random.key(0), config)
    x = jnp.asarray(rng.normal(size=(2, 64)), jnp.bfloat16)

    def values(params, x):
        return latent_moe(params, x, config)[0]

    program = jax.jit(jax.shard_map(values, mesh=mesh_of_two(), in_specs=(P(), P("i")), out_specs=P("i")))
    wanted = np.concatenate([np.asarray(jax.jit(values)(params, x[i : i + 1]), np.float32) for i in range(2)])
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(program(params, x), np.float32), wanted)
