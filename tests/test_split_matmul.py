"""The float32 matmul by bfloat16 parts, against float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.device import Device
from jax_latent_moe.routing import router
from jax_latent_moe.routing.split_matmul import split_matmul, split_matmul_beside


def relative_error(value, exact):
    return np.linalg.norm(np.asarray(value, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("kernel_dtype", ["float32", "bfloat16"])
def test_the_product_is_as_exact_as_a_float32_matmul(rng, kernel_dtype):
    """The kernel's gradient is as exact as 16 bits of that of the product allow."""
    x = jnp.asarray(rng.standard_normal((40, 300)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((300, 24)), kernel_dtype)
    dlogits = jnp.asarray(rng.standard_normal((40, 24)), jnp.float32)
    logits, vjp = jax.jit(lambda x, kernel: jax.vjp(split_matmul, x, kernel))(x, kernel)
    dx, dkernel = vjp(dlogits)
    chex.assert_type([logits, dx, dkernel], [jnp.float32, jnp.bfloat16, kernel_dtype])

    exact_x, exact_kernel, exact_dlogits = (np.asarray(v, np.float64) for v in (x, kernel, dlogits))
    assert relative_error(logits, exact_x @ exact_kernel) < 1e-6
    assert relative_error(dkernel, exact_x.T @ exact_dlogits) < (2**-16 if kernel_dtype == "float32" else 4e-3)
    assert relative_error(dx, exact_dlogits @ exact_kernel.T) < 4e-3


def test_another_product_beside_it(rng):
    x, other = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((40, 300), (300, 56)))
    kernel = jnp.asarray(rng.standard_normal((300, 24)), jnp.float32)
    dlogits = jnp.asarray(rng.standard_normal((40, 24)), jnp.float32)
    dproduct = jnp.asarray(rng.standard_normal((40, 56)), jnp.bfloat16)
    (logits, product), vjp = jax.jit(lambda *args: jax.vjp(split_matmul_beside, *args))(x, kernel, other)
    dx, dkernel, dother = vjp((dlogits, dproduct))
    chex.assert_type(
        [logits, product, dx, dkernel, dother], [jnp.float32, *[jnp.bfloat16] * 2, jnp.float32, jnp.bfloat16]
    )

    x, kernel, other, dlogits, dproduct = (np.asarray(v, np.float64) for v in (x, kernel, other, dlogits, dproduct))
    assert relative_error(logits, x @ kernel) < 1e-6
    assert relative_error(product, x @ other) < 4e-3
    assert relative_error(dx, dlogits @ kernel.T + dproduct @ other.T) < 4e-3
    assert relative_error(dkernel, x.T @ dlogits) < 2**-16
    assert relative_error(dother, x.T @ dproduct) < 4e-3


def test_no_part_is_lost_to_a_dropped_cast(rng):
    """One bfloat16 part would be off by 2^-9, two by 2^-17."""
    x = jnp.eye(16, dtype=jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
    np.testing.assert_array_equal(jax.jit(split_matmul)(x, kernel), kernel)


def test_the_router_takes_it_on_a_gpu_alone(rng, monkeypatch):
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    programs = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(router, "current_device", lambda platform=platform: Device(platform, ""))
        assert relative_error(router.router_logits(x, kernel, "float32"), exact) < 1e-6
        programs.append(str(jax.make_jaxpr(lambda x, k: router.router_logits(x, k, "float32"))(x, kernel)))
    assert ["reduce_precision" in program for program in programs] == [False, True]
