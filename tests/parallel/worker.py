"""One of several processes that run layers together and compare the results with a run of one process."""

import ast
import dataclasses
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_latent_moe import RouterConfig, latent_moe, update_correction_bias
from jax_latent_moe.parallel import param_specs, token_spec
from tests import cases, layers
from tests.parallel.meshes import BASE, make_mesh
from tests.tolerances import RELATIVE, assert_close, assert_trees_close

LOSSES = RouterConfig(switch_loss_coef=0.3, sequence_loss_coef=0.2, z_loss_coef=0.1)


def objective(params, x, mask, dy, config):
    """A number that depends on every output and loss; what has no gradient."""
    y, aux = latent_moe(params, x, config, token_mask=mask)
    rate = config.router.bias_update_rate
    bias = update_correction_bias(params["router"]["bias"], aux.tokens_per_expert, rate)
    return (y * dy).sum() + sum(aux.losses.values()), (y, aux.losses, aux.tokens_per_expert, bias)


def compare(rng, sizes, dispatch: str, norm: str):
    """The layer over a mesh of all processes against the layer of this one: masked tokens, at times few experts."""
    parallel = dataclasses.replace(BASE.parallel, dispatch=dispatch)
    eps = 1e-2 if norm != "none" else 1e-5
    config = dataclasses.replace(BASE, parallel=parallel, router=LOSSES, latent_norm=norm, latent_norm_eps=eps)
    case = cases.random_inputs(rng, config, (4, 3), masked=True)
    if rng.random() < 0.5:
        case.params["router"]["bias"][:3] += (
            8  # every token goes to the first three experts: some processes have no row
        )
    params = layers.cast(case.params, "float32")
    x, dy = np.float32(case.x), np.float32(case.dy)
    gradient = jax.value_and_grad(objective, (0, 1), has_aux=True)
    wanted = jax.jit(gradient, static_argnums=4)(
        params, x, case.token_mask, dy, dataclasses.replace(config, parallel=None)
    )
    mesh = make_mesh(*sizes)

    def place(leaf, spec):
        leaf, sharding = np.asarray(leaf), NamedSharding(mesh, spec)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    tokens = [place(part, token_spec(parallel, mesh)) for part in (x, case.token_mask, dy)]
    with jax.set_mesh(mesh):
        together = jax.jit(gradient, static_argnums=4, out_shardings=NamedSharding(mesh, PartitionSpec()))
        found = together(jax.tree.map(place, params, param_specs(config, mesh)), *tokens, config)
    ((value, (y, losses, load, bias)), grads), ((wanted_value, of_one), wanted_grads) = found, wanted
    assert_close(y, of_one[0], "float32", "y")
    # The objective adds terms of either sign: rounding is of the size of the terms, not of what is left of them.
    size = np.abs(np.asarray(of_one[0]) * dy).sum() + sum(of_one[1].values())
    assert abs(float(value) - float(wanted_value)) <= RELATIVE["float32"] * size, (
        f"objective {value}, not {wanted_value}"
    )
    assert_trees_close(losses, of_one[1], "float32", "losses")
    np.testing.assert_array_equal(load, of_one[2])
    np.testing.assert_array_equal(bias, of_one[3])
    assert_trees_close(grads[0], wanted_grads[0], "float32", "gradient")
    assert_close(grads[1], wanted_grads[1], "float32", "gradient of x")


def main(address: str, processes: str, process: str, seed: str, cells: str):
    """Joins the others, and compares every (sizes, dispatch, norm) of cells."""
    jax.distributed.initialize(address, int(processes), int(process), heartbeat_timeout_seconds=30)
    rng = np.random.default_rng(int(seed))  # every process draws the same
    for cell in ast.literal_eval(cells):
        compare(rng, *cell)
        print(f"{cell} agrees")
    print(f"process {process} of {jax.process_count()} agrees")


if __name__ == "__main__":
    main(*sys.argv[1:])
