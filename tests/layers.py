"""The layer under test, run on a `Case`, and its comparison with the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_latent_moe import latent_moe
from tests import oracle
from tests.cases import DTYPES, Case
from tests.tolerances import assert_close, assert_trees_close


def cast(params, dtype: str) -> dict:
    """A parameter tree in dtype, except the correction bias, which is float32."""
    return {
        part: {name: jnp.asarray(leaf, DTYPES["float32" if name == "bias" else dtype]) for name, leaf in leaves.items()}
        for part, leaves in params.items()
    }


@functools.cache
def compiled(config):
    """Jitted (params, x, optional arguments, dy) -> (y, aux), gradients of params and of x."""

    @jax.jit
    def run(params, x, optional, dy):
        def objective(params, x):
            y, aux = latent_moe(params, x, config, **optional)
            wide = jnp.promote_types(y.dtype, jnp.float32)
            return jnp.sum(y.astype(wide) * dy) + sum(aux.losses.values()), (y, aux)

        (_, outputs), grads = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, x)
        return outputs, *grads

    return run


def run(case: Case):
    """(y, aux), gradients of params and of x, in the case's dtype."""
    dtype = case.config.dtype
    wide = DTYPES["float64" if dtype == "float64" else "float32"]
    x = jnp.asarray(case.x, DTYPES[dtype])
    return compiled(case.config)(cast(case.params, dtype), x, case.optional(), case.dy.astype(wide))


def dense(config, expert_ids, weights) -> np.ndarray:
    """The routing as weights [..., E] with NaN where an expert was not chosen: free of the order of choices."""
    out = np.full((*expert_ids.shape[:-1], config.num_experts), np.nan)
    for index in np.argwhere(np.asarray(expert_ids) >= 0):
        *token, _ = index
        out[(*token, int(expert_ids[tuple(index)]))] = weights[tuple(index)]
    return out


def check_against_oracle(case: Case, dtype: str | None = None):
    """Outputs, routing, losses, counts and every gradient; `dtype` names the tolerance."""
    dtype = dtype or case.config.dtype
    router_dtype = "float64" if dtype == "float64" else "float32"
    expected = case.oracle()
    (y, aux), dparams, dx = run(case)
    assert y.dtype == case.config.dtype
    assert y.shape == case.x.shape
    assert aux.expert_ids.dtype == jnp.int32
    routing = dense(case.config, aux.expert_ids, aux.weights)
    wanted = dense(case.config, expected.expert_ids, expected.weights)
    np.testing.assert_array_equal(np.isnan(routing), np.isnan(wanted), "expert ids")
    assert_close(np.nan_to_num(routing), np.nan_to_num(wanted), router_dtype, "weights")
    np.testing.assert_array_equal(aux.tokens_per_expert, expected.tokens_per_expert)
    np.testing.assert_array_equal(aux.dropped_per_expert, expected.dropped_per_expert)
    assert_trees_close(aux.losses, expected.losses, router_dtype, "losses")
    if case.config.router.global_loss_coef:
        np.testing.assert_array_equal(aux.global_counts, expected.global_counts)
    assert_close(y, expected.y, dtype, "y")
    wanted_params, wanted_x = oracle.backward(case.params, case.config, expected, case.dy)
    assert_trees_close(dparams, wanted_params, dtype, "gradient")
    assert_close(dx, wanted_x, dtype, "gradient of x")
