"""The routed experts on latent rows: gather, two grouped matmuls around an activation, weighted combine.

One differentiation rule covers the block. It keeps the tokens, the routing and the pre-activation; gathered rows and
hidden rows are made again in the backward pass, and the experts' outputs are never needed there: the gradient of a
weight is <dc w_out^T, h> as in SonicMoE (arXiv 2512.14080). A backend that fuses the activation, or its gradient, into
a product is asked to; of the others the two are composed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jax_latent_moe.activations import activate
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.grouped_matmul import FusedActivation, grouped_matmul, grouped_outer, problem, select_fusing
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
    return _forward(config, tokens, weights, w_in, w_out, plan, keep_pre=False)[0]


def _routed_fwd(config, tokens, weights, w_in, w_out, plan):
    combined, pre = _forward(config, tokens, weights, w_in, w_out, plan, keep_pre=True)
    return combined, (tokens, weights, w_in, w_out, plan, pre)


def _forward(config, tokens, weights, w_in, w_out, plan, *, keep_pre):
    pre, hidden = up(config, gather_rows(tokens, plan), w_in, plan.group_sizes, keep_pre=keep_pre)
    out = grouped_matmul(hidden, w_out, plan.group_sizes, backend=config.backend)
    return combine(out, plan, weights).astype(tokens.dtype), pre


def _routed_bwd(config, residuals, dcombined):
    tokens, weights, w_in, w_out, plan, pre = residuals
    outer = functools.partial(grouped_outer, group_sizes=plan.group_sizes, backend=config.backend)
    dout = gather_rows(dcombined, plan)
    row_weights = weights.reshape(-1)[plan.slot_of_row]
    dpre, weighted_hidden, drow_weights = down_gradient(config, dout, w_out, plan.group_sizes, pre, row_weights)
    dw_out = outer(weighted_hidden, dout)
    dweights = drow_weights[plan.row_of_slot].astype(weights.dtype)
    dw_in = outer(gather_rows(tokens, plan), dpre)
    drows = grouped_matmul(dpre, w_in, plan.group_sizes, transpose_w=True, backend=config.backend)
    dtokens = combine(drows, plan).astype(tokens.dtype)
    return dtokens, dweights, dw_in, dw_out, None


def up(config, rows, w_in, group_sizes, *, keep_pre):
    """The pre-activation rows x w_in, None where a fused product need not keep it, and the hidden rows.

    Args:
        config: read for the activation and the backend.
        rows: [R, l], sorted by expert.
        w_in: [E, l, m], gated [E, l, 2 m].
        group_sizes: [E].
        keep_pre: whether the pre-activation is wanted.
    """
    activation = _fused_activation(config)
    fusing = select_fusing(problem("rows_w", rows.shape[0], w_in.shape, rows.dtype, activation), config.backend)
    if fusing:
        pre, hidden = fusing.matmul_activation(rows, w_in, group_sizes, activation=activation, keep_pre=keep_pre)
        return checkpoint_name(pre, PREACTIVATION) if keep_pre else None, hidden
    pre = checkpoint_name(grouped_matmul(rows, w_in, group_sizes, backend=config.backend), PREACTIVATION)
    return pre, activate(pre, config).astype(rows.dtype)


def down_gradient(config, dout, w_out, group_sizes, pre, row_weights):
    """The gradient of pre and the hidden rows, both times the rows' weights, and the gradient of these weights.

    Args:
        config: read for the activation and the backend.
        dout: [R, l], gradient of the experts' outputs before they are weighted.
        w_out: [E, m, l].
        group_sizes: [E].
        pre: [R, m], gated [R, 2 m].
        row_weights: [R].
    """
    activation = _fused_activation(config)
    fusing = select_fusing(problem("rows_wt", dout.shape[0], w_out.shape, dout.dtype, activation), config.backend)
    if fusing:
        return fusing.matmul_activation_grad(dout, w_out, group_sizes, pre, row_weights, activation=activation)
    hidden, activation_vjp = jax.vjp(functools.partial(activate, config=config), pre)
    dhidden = grouped_matmul(dout, w_out, group_sizes, transpose_w=True, backend=config.backend).astype(hidden.dtype)
    row_weights = row_weights[:, None].astype(hidden.dtype)
    (dpre,) = activation_vjp(row_weights * dhidden)
    return dpre.astype(dout.dtype), (row_weights * hidden).astype(dout.dtype), jnp.sum(dhidden * hidden, axis=1)


def _fused_activation(config) -> FusedActivation:
    approximate = "_tanh" if config.activation in ("gelu", "geglu") and config.gelu_approximate else ""
    if config.activation != "situ_glu":
        return FusedActivation(config.activation + approximate)
    return FusedActivation("situ_glu", config.situ_beta, config.situ_linear_beta or 0.0)


_routed.defvjp(_routed_fwd, _routed_bwd)
