"""The routed experts with low-rank adapters, product by product: an adapter adds to the pre-activation.

JAX differentiates the products one by one. The gather, the biases, the activation and the combine have rules of their
own: no gradient is a scatter, and the activation keeps one residual. The backend of the config runs the products with
the frozen weights. Kernels may refuse products of rank r, so these run on the first backend that takes them.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_latent_moe.activations import BoundActivation, Residual, activate, hidden_and_pullback
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.errors import InputError
from jax_latent_moe.expert_biases import Biases, bias_gradient, plus_bias, times_bias
from jax_latent_moe.expert_plan import PORTABLE
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.grouped_matmul import grouped_matmul
from jax_latent_moe.grouped_matmul.operands import gathered
from jax_latent_moe.low_rank import LowRank, base_of
from jax_latent_moe.routing.permute import DispatchPlan, combine, rows_of


def adapted_experts(
    config: LatentMoEConfig,
    tokens: Float[Array, "t l"],
    weights: Float[Array, "t k"],
    w_in: Float[Array, "e l *two m"] | ScaledArray | LowRank,
    w_out: Float[Array, "e m l"] | ScaledArray | LowRank,
    biases: Biases | None,
    dispatch: DispatchPlan,
) -> Float[Array, "t l"]:
    """The weighted sum of the experts' outputs, as `routed_experts` defines it.

    Raises:
        UnsupportedError: the named backend cannot run one of the products.
        InputError: config.precision is set.
    """
    if config.precision is not None:
        raise InputError(
            f"{config.precision} does not go with low-rank adapters: set precision=None, or lora.merge(params, config)."
        )
    sizes, (b_in, b_out) = dispatch.group_sizes, biases or (None, None)
    rows = _rows(tokens, dispatch)
    pre = plus_bias(_product(config, rows, w_in, sizes)[0], b_in, sizes)
    hidden = _activated(config.bound_activation, pre)
    return _down(config, hidden, w_out, b_out, weights, dispatch).astype(tokens.dtype)


def _product(config, rows, weight, sizes):
    """The rows times a weight, and their r columns on the way through its adapter, or None."""
    out = _by_base(config, rows, base_of(weight), sizes)
    if not isinstance(weight, LowRank):
        return out, None
    narrow = _narrow(rows, weight.a, weight.scale, sizes)
    return out + _widened(narrow, weight.b, sizes), narrow


def _by_base(config, rows, base, sizes):
    base = base if isinstance(base, ScaledArray) else base.reshape(*base.shape[:2], -1)
    return grouped_matmul(rows, base, sizes, backend=config.backend)


def _narrow(rows, a, scale, sizes):
    return grouped_matmul(rows, a, sizes) * jnp.asarray(scale, rows.dtype)


def _widened(narrow, b, sizes):
    return grouped_matmul(narrow, b.reshape(*b.shape[:2], -1), sizes)


@jax.custom_vjp
def _rows(tokens, dispatch):
    """The rows of tokens."""
    return gathered(rows_of(tokens, dispatch))


def _rows_fwd(tokens, dispatch):
    return _rows(tokens, dispatch), (tokens, dispatch)


def _rows_bwd(residuals, drows):
    tokens, dispatch = residuals
    return combine(drows, dispatch).astype(tokens.dtype), None


_rows.defvjp(_rows_fwd, _rows_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activated(activation, pre):
    """The hidden rows, in the dtype of the pre-activation."""
    hidden = activate(pre, activation).astype(pre.dtype)
    # Without the barrier, XLA would keep the pre-activation as well, and compute hidden rows from it again.
    return jax.lax.optimization_barrier(hidden) if _residual(activation) == "hidden" else hidden


def _activated_fwd(activation, pre):
    hidden = _activated(activation, pre)
    return hidden, hidden if _residual(activation) == "hidden" else pre


def _activated_bwd(activation, kept, dhidden):
    wide, pullback = hidden_and_pullback(kept, _residual(activation), activation)
    return (pullback(dhidden.astype(wide.dtype)).astype(kept.dtype),)


_activated.defvjp(_activated_fwd, _activated_bwd)


def _residual(activation: BoundActivation) -> Residual:
    """The activation's first residual that needs no kernel."""
    return next(residual for residual in activation.definition.residuals if residual in PORTABLE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _down(config, hidden, w_out, b_out, weights, dispatch):
    """The weighted sum of each token's outputs of experts, in at least float32."""
    return _down_fwd(config, hidden, w_out, b_out, weights, dispatch)[0]


def _down_fwd(config, hidden, w_out, b_out, weights, dispatch):
    out, narrow = _product(config, hidden, w_out, dispatch.group_sizes)
    out = plus_bias(out, b_out, dispatch.group_sizes)
    return combine(out, dispatch, weights), (hidden, narrow, w_out, b_out, weights, dispatch)


def _down_bwd(config, residuals, dcombined):
    """As in `experts`, the gradient of a weight needs no outputs: it is <dhidden, hidden> before the weight multiplies.

    The weight of a row multiplies the adapter's r columns instead of the row.
    """
    hidden, narrow, w_out, b_out, weights, dispatch = residuals
    sizes, wide = dispatch.group_sizes, at_least_float32(hidden.dtype)
    dout = gathered(rows_of(dcombined.astype(hidden.dtype), dispatch))
    row_weights = dispatch.weights_of_rows(weights)[:, None].astype(wide)

    def weighted(rows):
        return (row_weights * rows.astype(wide)).astype(rows.dtype)

    def dot(left, right):
        return jnp.sum(left.astype(wide) * right.astype(wide), axis=1)

    base = base_of(w_out)
    (dhidden,) = jax.vjp(lambda hidden: _by_base(config, hidden, base, sizes), hidden)[1](dout)
    sums, dhidden = dot(dhidden, hidden), weighted(dhidden)
    if isinstance(w_out, LowRank):
        _, of_b = jax.vjp(lambda narrow, b: _widened(narrow, b, sizes), weighted(narrow), w_out.b)
        dnarrow, db = of_b(dout)
        sums += dot(dnarrow, narrow)
        _, of_a = jax.vjp(lambda hidden, a: _narrow(hidden, a, w_out.scale, sizes), hidden, w_out.a)
        added, da = of_a(weighted(dnarrow))
        dhidden += added
        dw_out = LowRank(None, da, db, w_out.scale)
    else:
        dw_out = None
        if not isinstance(base, ScaledArray):
            (dw_out,) = jax.vjp(lambda base: _by_base(config, hidden, base, sizes), base)[1](weighted(dout))
    db_out = None
    if b_out is not None:
        sums += times_bias(dout, b_out, sizes)
        db_out = bias_gradient(row_weights[:, 0].astype(dout.dtype), dout, sizes)
    # The barrier makes XLA sum before it gathers. Without it, XLA gathers all terms of each sum.
    sums = jax.lax.optimization_barrier(sums)
    return dhidden, dw_out, db_out, sums[dispatch.row_of_assignment].astype(weights.dtype), None


_down.defvjp(_down_fwd, _down_bwd)
