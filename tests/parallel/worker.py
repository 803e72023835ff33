"""One of several processes that run a layer together and compare it with their own alone."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_latent_moe import init_params, latent_moe
from jax_latent_moe.parallel import param_specs, token_spec
from tests.parallel.meshes import BASE, make_mesh
from tests.tolerances import assert_close, assert_trees_close


def loss(params, x, config):
    """A number that depends on every output."""
    y, aux = latent_moe(params, x, config)
    return jnp.sum(jnp.sin(y)), aux.tokens_per_expert


def main(address: str, processes: int, process: int, seed: int):
    """The layer over all processes, experts over half of them, against the layer alone."""
    jax.distributed.initialize(address, processes, process, heartbeat_timeout_seconds=30)
    mesh = make_mesh(processes // 2, 1, 2, 1)
    params, x = (
        init_params(jax.random.key(seed), BASE),
        np.asarray(jax.random.normal(jax.random.key(seed + 1), (4, 3, 16))),
    )
    gradient = jax.value_and_grad(loss, has_aux=True)
    (value, load), wanted = gradient(params, jnp.asarray(x), dataclasses.replace(BASE, parallel=None))

    def place(leaf, spec):
        leaf, sharding = np.asarray(leaf), NamedSharding(mesh, spec)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    placed, tokens = jax.tree.map(place, params, param_specs(BASE, mesh)), place(x, token_spec(BASE.parallel, mesh))
    with jax.set_mesh(mesh):
        together = jax.jit(gradient, static_argnums=2, out_shardings=NamedSharding(mesh, PartitionSpec()))
        (value_together, load_together), grads = together(placed, tokens, BASE)
    assert_close(value_together, value, "float32")
    np.testing.assert_array_equal(load_together, load)
    assert_trees_close(grads, wanted, "float32")
    print(f"process {process} of {jax.process_count()} agrees")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
