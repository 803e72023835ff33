"""fsdp gathers kernels in the dtype that the layer reads them in, and adds up their gradients in their own."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import Precision, init_params, latent_moe, param_shapes
from tests.parallel.meshes import BASE, make_mesh

NARROW = dataclasses.replace(BASE, dtype="bfloat16", latent_norm="post", shared_expert_gate=True)


def gathered(config):
    """The (shape, dtype) of each gathered array of a program for two devices along fsdp."""
    x = jax.ShapeDtypeStruct((8, 3, config.hidden_size), jnp.float32)
    with jax.set_mesh(make_mesh(1, 2, 1, 1)):
        program = jax.jit(latent_moe, static_argnums=2).lower(param_shapes(config), x, config).as_text()
    found = re.findall(r'"stablehlo\.all_gather".*?-> tensor<((?:\d+x)+)(\w+)>', program)
    return [(tuple(map(int, shape[:-1].split("x"))), dtype) for shape, dtype in found]


def test_all_kernels_but_the_router_s_are_gathered_in_the_dtype_of_the_layer():
    d, latent, e, m = 16, 8, 8, 8
    narrow = [(e, latent, m), (e, m, latent), (d, latent), (latent, d), (d, m), (m, d), (d, 1)]
    assert sorted(gathered(NARROW)) == sorted([*((shape, "bf16") for shape in narrow), ((d, e), "f32")])


@pytest.mark.parametrize(("param_dtype", "dtype"), [("bfloat16", "float32"), ("float32", "float32")])
def test_kernels_that_are_no_wider_than_the_layer_s_dtype_travel_as_they_are(param_dtype, dtype):
    config = dataclasses.replace(NARROW, param_dtype=param_dtype, dtype=dtype)
    assert {found for _, found in gathered(config)} == {"bf16" if param_dtype == "bfloat16" else "f32"}


def test_experts_that_fp8_encodes_are_gathered_as_they_are_stored():
    found = gathered(dataclasses.replace(NARROW, precision=Precision("fp8_block")))
    assert {dtype for shape, dtype in found if len(shape) == 3} == {"f32"}
    assert {dtype for shape, dtype in found if shape in ((16, 1), (8, 16))} == {"bf16"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_and_gradients_have_the_bits_that_replicated_kernels_give(rng, dtype):
    """Two devices add two numbers in any order. Along data they hold whole kernels, and nothing is gathered."""
    config = dataclasses.replace(NARROW, dtype=dtype)
    params = init_params(jax.random.key(0), config)
    params["router"]["bias"] = params["router"]["bias"].at[:4].add(8)  # the others get no token
    x = jnp.asarray(rng.normal(size=(6, 3, 16)), jnp.float32)

    def loss(params, x):
        return jnp.sum(jnp.square(latent_moe(params, x, config)[0].astype(jnp.float32)))

    results = []
    for sizes in ((2, 1, 1, 1), (1, 2, 1, 1)):
        with jax.set_mesh(make_mesh(*sizes)):
            results.append(jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)))
    jax.tree.map(np.testing.assert_array_equal, *results)
    experts = results[1][1][0]["experts"]["w_in"]
    assert experts.dtype == np.float32
    assert not np.any(experts[4:])
    assert np.any(experts[:4])
    assert not np.array_equal(experts, experts.astype(dtype).astype(np.float32)), "sums are not rounded"
