"""The Pallas kernels on a Hopper GPU, through the public calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.config import PallasBackend, PallasMatmulTile, PallasWgradTile
from jax_latent_moe.grouped_matmul import grouped_wgrad, problem, select
from jax_latent_moe.grouped_matmul.pallas_sm90.backend import Pallas
from jax_latent_moe.grouped_matmul.sm90 import KERNEL_ACTIVATIONS
from tests.gpu.grouped import (
    check,
    check_fused,
    check_weights_beyond_two_to_the_31_elements,
    float64,
    needs_hopper,
)
from tests.tolerances import assert_close

pytestmark = needs_hopper
BACKENDS = {
    "chosen tiles": PallasBackend(),
    "tall tiles": PallasBackend(
        PallasMatmulTile(rows=192, columns=128, stages=4, store_buffers=1, band=3),
        PallasWgradTile(rows=192, columns=128, stages=4, store_buffers=1),
    ),
    "clusters": PallasBackend(PallasMatmulTile(cluster=2), PallasWgradTile(cluster=2)),
}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


@every_backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_random_groups_with_empty_experts(rng, backend, dtype):
    for total in (1517, 900, 1):
        sizes = rng.multinomial(total, rng.dirichlet(np.full(16, 0.3)))
        check(backend, rng, dtype, sizes, 1517, 256, 320)


@every_backend
def test_one_expert_has_all_and_none_has_any(rng, backend):
    for sizes in (np.eye(16, dtype=int)[11] * 1517, np.zeros(16, int)):
        check(backend, rng, "bfloat16", sizes, 1517, 256, 320)


@every_backend
@pytest.mark.parametrize("num_rows", [1, 8, 22])
def test_few_rows(rng, backend, num_rows):
    check(backend, rng, "bfloat16", rng.multinomial(num_rows, np.full(40, 1 / 40)), num_rows, 128, 192)


def test_weights_beyond_two_to_the_31_elements(rng):
    check_weights_beyond_two_to_the_31_elements(PallasBackend(), rng)


def test_auto_picks_it_where_no_kernels_are_compiled(library_at, tmp_path):
    library_at(tmp_path / "none.so")
    bound = select(problem("fwd", 4096, (64, 256, 512), jnp.bfloat16))
    assert type(bound.backend).__name__ == "Pallas"


FUSING = Pallas(PallasBackend(fuse="always"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "residual"), [("relu2", "hidden"), *((name, "pre") for name in KERNEL_ACTIVATIONS)])
def test_fused_activations(rng, name, residual, dtype):
    sizes = rng.multinomial(900, rng.dirichlet(np.full(16, 0.3)))
    check_fused(FUSING, rng, name, residual, dtype, sizes, 1517, 128, 192)
    check_fused(FUSING, rng, name, residual, dtype, np.asarray([0, 700, 1, 77, 222]), 1000, 256, 704)


@pytest.mark.parametrize(("name", "residual"), [("relu2", "hidden"), ("swiglu", "pre")])
def test_fused_activations_of_few_rows(rng, name, residual):
    for num_rows, total in ((1, 1), (22, 22), (22, 13), (9, 0)):
        sizes = rng.multinomial(total, np.full(40, 1 / 40))
        check_fused(FUSING, rng, name, residual, "bfloat16", sizes, num_rows, 128, 192)


def test_wgrad_differentiates(rng):
    """The gradient of a weight gradient is two grouped matmuls."""
    sizes = jnp.asarray([100, 0, 28], jnp.int32)
    rows, dout = (jnp.asarray(rng.normal(size=(128, size)), jnp.bfloat16) for size in (64, 128))
    weights = jnp.asarray(rng.normal(size=(3, 64, 128)), jnp.bfloat16)

    def loss(backend):
        return lambda rows, dout: jnp.sum(
            (grouped_wgrad(rows, dout, sizes, backend=backend) * weights).astype(jnp.float32)
        )

    for ours, xla in zip(
        jax.grad(loss("pallas"), (0, 1))(rows, dout), jax.grad(loss("xla"), (0, 1))(rows, dout), strict=True
    ):
        assert_close(float64(ours), float64(xla), "bfloat16")
