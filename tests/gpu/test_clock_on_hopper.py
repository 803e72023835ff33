"""The device's clock on a Hopper GPU, against the host's and the fastest that the GPU can be."""

import jax
import jax.numpy as jnp
import pytest

from jax_latent_moe.grouped_matmul.tuning.timing import device_ms, host_ms, jax_candidate
from jax_latent_moe.native import library
from tests.gpu.grouped import needs_hopper

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]


def test_a_long_matmul_takes_as_long_by_both_clocks():
    """And no less than its operations take at the peak rate of the tensor cores."""
    a = jnp.ones((8192, 8192), jnp.bfloat16)
    call = jax_candidate(jnp.matmul, a, a)()()
    call.wait(call.run())
    device, host = (min(clock(call, 8) for _ in range(5)) for clock in (device_ms, host_ms))
    assert device > 1e3 * 2 * 8192**3 / 1000e12
    assert device == pytest.approx(host, rel=0.05)


def test_a_short_kernel_takes_at_least_what_its_bytes_do():
    """The host takes longer to dispatch it."""
    x = jax.random.normal(jax.random.key(0), (2**25,), jnp.bfloat16)
    call = jax_candidate(jnp.negative, x)()()
    call.wait(call.run())
    times = [device_ms(call, 20) for _ in range(5)]
    assert min(times) > 1e3 * 2 * x.nbytes / 5e12
    assert min(times) < host_ms(call, 1)
