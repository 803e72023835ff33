"""The routed experts on latent rows: gather, two grouped matmuls around an activation, weighted combine.

One differentiation rule covers the block. It keeps the tokens, the routing and the pre-activation; gathered rows and
hidden rows are made again in the backward pass, and the experts' outputs are never needed there: the gradient of a
weight is <dc w_out^T, h> as in SonicMoE (arXiv 2512.14080).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jax_latent_moe.activations import activate
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.grouped_matmul import grouped_matmul, grouped_outer
from jax_latent_moe.permute import Plan, combine, gather_rows

PREACTIVATION = "latent_moe_preactivation"


def routed_experts(
    config: LatentMoEConfig,
    tokens: Float[Array, "t l"],
    weights: Float[Array, "t k"],
    w_in: Float[Array, "e l *two m"],
    w_out: Float[Array, "e m l"],
    plan: Plan,
) -> Float[Array, "t l"]:
    """sum_j weights[t, j] * expert_j(tokens[t]) -> [T, l] in the dtype of tokens, summed in float32.

    Args:
        config: read for the activation and the backend.
        tokens: [T, l].
        weights: [T, k], 0 where a choice reaches no expert.
        w_in: [E, l, m], gated [E, l, 2, m], in the dtype of tokens.
        w_out: [E, m, l], in the dtype of tokens.
        plan: where each choice stands among the sorted rows.
    """
    return _routed(config, tokens, weights, w_in.reshape(*w_in.shape[:2], -1), w_out, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(config, tokens, weights, w_in, w_out, plan):
    return _routed_fwd(config, tokens, weights, w_in, w_out, plan)[0]


def _routed_fwd(config, tokens, weights, w_in, w_out, plan):
    matmul = functools.partial(grouped_matmul, group_sizes=plan.group_sizes, backend=config.backend)
    pre = checkpoint_name(matmul(gather_rows(tokens, plan), w_in), PREACTIVATION)
    out = matmul(activate(pre, config).astype(tokens.dtype), w_out)
    combined = combine(out, plan, weights).astype(tokens.dtype)
    return combined, (tokens, weights, w_in, w_out, plan, pre)


def _routed_bwd(config, residuals, dcombined):
    tokens, weights, w_in, w_out, plan, pre = residuals
    matmul = functools.partial(grouped_matmul, group_sizes=plan.group_sizes, backend=config.backend)
    outer = functools.partial(grouped_outer, group_sizes=plan.group_sizes, backend=config.backend)
    dtype = tokens.dtype

    dout = gather_rows(dcombined, plan)
    hidden, activation_vjp = jax.vjp(functools.partial(activate, config=config), pre)
    dhidden = matmul(dout, w_out, transpose_w=True).astype(hidden.dtype)
    row_weights = weights.reshape(-1)[plan.slot_of_row, None].astype(hidden.dtype)
    dw_out = outer((row_weights * hidden).astype(dtype), dout)
    dweights = jnp.sum(dhidden * hidden, axis=1)[plan.row_of_slot].astype(weights.dtype)
    (dpre,) = activation_vjp(row_weights * dhidden)
    dpre = dpre.astype(dtype)

    dw_in = outer(gather_rows(tokens, plan), dpre)
    dtokens = combine(matmul(dpre, w_in, transpose_w=True), plan).astype(dtype)
    return dtokens, dweights, dw_in, dw_out, None


_routed.defvjp(_routed_fwd, _routed_bwd)
