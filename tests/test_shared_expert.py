"""The shared expert by a backend that fuses its activation, against float64, and what decides that it runs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from jax_latent_moe import CutlassBackend, InputError, latent_moe
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.shared_expert import LEAST_ROWS, SharedPlan, plan_shared_expert, shared_expert
from tests import cases
from tests.cases import TOY
from tests.fusing import FusingBackend
from tests.layers import cast
from tests.oracle.shared import shared
from tests.parallel.meshes import make_mesh
from tests.tolerances import assert_close, assert_trees_close

pytestmark = pytest.mark.usefixtures("quick_compilation")

D, INNER, ROWS = TOY.hidden_size, 6, LEAST_ROWS + 3
RESIDUALS = {"relu2": "hidden", "gelu": "pre", "swiglu": "gate_hidden", "situ_glu": "pre"}


def config_of(activation: str, **changes) -> LatentMoEConfig:
    kept = (RESIDUALS[activation],)
    fields = dict(activation=activation, shared_expert_intermediate_size=INNER, backend=FusingBackend(kept, kept))
    return dataclasses.replace(TOY, **(fields | changes))


def draw(rng, config):
    """Parameters, tokens and the gradient of the output."""
    two = (2,) if config.gated else ()
    shapes = {"w_in": (D, *two, INNER), "w_out": (INNER, D)} | ({"gate": (D, 1)} if config.shared_expert_gate else {})
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return params, *(rng.normal(size=(ROWS, D)).astype(np.float32) for _ in range(2))


def with_gradients(config, params, x, dout):
    """What `shared` returns."""
    out, pullback = jax.vjp(lambda params, x: shared_expert(x, params, config), params, x)
    grads, dx = pullback(dout)
    return {"out": out, "x": dx} | grads


def planned(config, rows=ROWS):
    return plan_shared_expert(config, rows, INNER, "float32")


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("activation", RESIDUALS)
def test_values_and_gradients(rng, activation, gate):
    config = config_of(activation, shared_expert_gate=gate)
    plan = planned(config)
    assert isinstance(plan, SharedPlan)
    assert plan.residual == RESIDUALS[activation]
    params, x, dout = draw(rng, config)
    expected = shared(config, x=x, dout=dout, **params)
    found = jax.jit(with_gradients, static_argnums=0)(config, params, x, dout)
    assert_trees_close(found, expected, "float32", "fused")
    assert_close(shared_expert(jnp.asarray(x), params, config), expected["out"], "float32", "without a gradient")


def test_padding_tokens_reach_nothing(rng):
    """The layer clears them before its shared expert reads them, whatever they hold."""
    config = config_of("relu2", hidden_size=D)
    case = cases.random_inputs(rng, config, (ROWS,), masked=True)
    mask = np.asarray(case.token_mask)
    params = cast(case.params, "float32")

    @functools.partial(jax.jit, static_argnums=0)
    def grads(config, x, dy):
        def loss(params, x):
            return jnp.sum(latent_moe(params, x, config, token_mask=mask)[0] * dy)

        return jax.grad(loss, (0, 1))(params, x)

    x, dy = (np.where(mask[:, None], part, np.nan).astype(np.float32) for part in (case.x, case.dy))
    dy = np.where(mask[:, None], dy, 0)
    found = grads(config, x, dy)
    expected = grads(dataclasses.replace(config, backend="xla"), x, dy)
    assert_trees_close(found[0], expected[0], "float32", "gradient")
    assert_close(found[1], expected[1], "float32", "gradient of x")
    assert not np.asarray(found[1])[~mask].any()


def test_inside_of_a_users_shard_map(rng):
    config = config_of("relu2")
    params, x, dout = draw(rng, config)
    x, dout = (np.concatenate([part, part[::-1]]) for part in (x, dout))

    def summed(params, x, dout):
        def loss(params, x):
            return jnp.sum(shared_expert(x, params, config) * dout)

        value, (grads, dx) = jax.value_and_grad(loss, (0, 1))(params, x)
        return jax.lax.psum(value, "data"), grads, dx

    mesh = make_mesh(2, names=("data",))
    split = jax.shard_map(summed, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=(P(), P(), P("data")))
    value, grads, dx = jax.jit(split)(params, x, dout)
    expected = shared(config, x=x, dout=dout, **params)
    assert_trees_close({"x": dx} | grads, {name: expected[name] for name in ("x", *grads)}, "float32", "gradient")
    assert np.isfinite(value)


def test_a_second_derivative_is_refused(rng):
    config = config_of("relu2")
    params, x, dout = draw(rng, config)

    def loss(x):
        return jnp.sum(shared_expert(x, params, config) * dout)

    with pytest.raises(InputError, match=r"first derivatives alone: set backend=CutlassBackend\(fuse='never'\)"):
        jax.grad(lambda x: jnp.sum(jax.grad(loss)(x)))(jnp.asarray(x))


@pytest.mark.parametrize(
    ("config", "rows", "reason"),
    [
        (config_of("relu2"), LEAST_ROWS - 1, f"kernels run from {LEAST_ROWS} tokens on, and {LEAST_ROWS - 1} are"),
        (config_of("relu2", backend="xla"), ROWS, "no fused kernel of xla was measured"),
        (config_of("relu2", backend=FusingBackend(("hidden",))), ROWS, "fusing does not fuse relu2 and its gradient"),
        (config_of("relu2", backend=FusingBackend((), ("hidden",))), ROWS, "fusing does not fuse relu2 and its grad"),
        (config_of("relu2", backend=CutlassBackend()), ROWS, "compute capability|its compiled library|Hopper"),
    ],
)
def test_when_xla_computes_it_all(config, rows, reason):
    found = planned(config, rows)
    assert isinstance(found, str)
    assert re.search(reason, found), found
