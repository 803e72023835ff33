"""Any number of tokens on a mesh: few that the devices do not divide are replicated, many are padded."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jax_latent_moe import RouterConfig, init_params, latent_moe, param_shapes
from jax_latent_moe.parallel import mesh
from tests import cases, layers
from tests.parallel.meshes import BASE, make_mesh

LOSSES = RouterConfig(switch_loss_coef=0.3, sequence_loss_coef=0.2, z_loss_coef=0.1)
CONFIG = dataclasses.replace(BASE, router=LOSSES, activation="swiglu", top_k=3)


@pytest.mark.parametrize(
    ("leading", "sizes", "norm", "masked", "replay"),
    [
        ((1,), (1, 1, 8, 1), "none", False, False),
        ((), (1, 1, 4, 2), "post", False, True),
        ((3, 1), (2, 1, 2, 2), "pre", True, False),
        ((5, 2), (1, 2, 4, 1), "none", True, True),
    ],
)
def test_replicated(rng, leading, sizes, norm, masked, replay):
    eps = 1e-2 if norm != "none" else 1e-5
    config = dataclasses.replace(CONFIG, latent_norm=norm, latent_norm_eps=eps)
    with jax.set_mesh(make_mesh(*sizes)):
        layers.check_against_oracle(cases.random_inputs(rng, config, leading, masked, replay))


def test_all_tokens_on_one_device_and_capacities(rng):
    """A capacity of the router drops as on one device; a capacity of the dispatch has nothing to bound."""
    router = RouterConfig(capacity_factor=0.75, norm_topk_prob=False)
    parallel = dataclasses.replace(BASE.parallel, capacity_factor=0.1)
    case = cases.random_inputs(rng, dataclasses.replace(BASE, router=router, parallel=parallel), (5,))
    case.params["router"]["bias"][:3] += 8
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        layers.check_against_oracle(case)


@pytest.mark.parametrize(("masked", "replay"), [(False, False), (True, True)])
def test_padded(rng, monkeypatch, masked, replay):
    monkeypatch.setattr(mesh, "REPLICATED_TOKENS", 4)
    case = cases.random_inputs(rng, CONFIG, (5, 2), masked, replay)
    with jax.set_mesh(make_mesh(2, 1, 2, 1)):
        layers.compiled.cache_clear()
        layers.check_against_oracle(case)


def test_a_replicated_token_takes_one_all_reduce():
    """The router's kernel and bias are gathered as well, as they are for any number of tokens."""
    x = jax.ShapeDtypeStruct((1, BASE.hidden_size), "float32")
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        text = str(jax.make_jaxpr(latent_moe, static_argnums=2)(param_shapes(BASE), x, BASE))
    counts = {name: text.count(f" {name}[") for name in ("psum", "all_gather", "all_to_all", "reduce_scatter")}
    assert counts == {"psum": 1, "all_gather": 2, "all_to_all": 0, "reduce_scatter": 0}


@pytest.mark.parametrize("leading", [(0,), (0, 5), (8, 0)])
def test_no_tokens(leading):
    params = init_params(jax.random.key(0), BASE)

    def loss(params, x):
        y, aux = latent_moe(params, x, BASE)
        return y.sum(), (y, aux.tokens_per_expert)

    with jax.set_mesh(make_mesh(2, 1, 4, 1)):
        gradient = jax.jit(jax.grad(loss, has_aux=True))
        grads, (y, counts) = gradient(params, jnp.zeros((*leading, BASE.hidden_size)))
    assert y.shape == (*leading, BASE.hidden_size)
    assert not counts.any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_many_tokens_are_split():
    """Every device computes only its part of a padded batch."""
    x = jax.ShapeDtypeStruct((mesh.REPLICATED_TOKENS + 1, BASE.hidden_size), "float32")
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        program = jax.jit(latent_moe, static_argnums=2).lower(param_shapes(BASE), x, BASE).as_text()
    assert f"tensor<{(mesh.REPLICATED_TOKENS + 4) // 4}x{BASE.hidden_size}xf32>" in program
