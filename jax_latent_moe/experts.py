"""The routed experts on latent rows: gather, two grouped matmuls around an activation, weighted combine.

One differentiation rule covers the block. It keeps the tokens, the routing and what the activation's gradient is made
of (`Kept`): the pre-activation, or no more bytes with the hidden rows among them. Gathered rows are made again in the
backward pass, and the experts' outputs are never needed there: the gradient of a weight is <dc w_out^T, h>, as in
SonicMoE (arXiv 2512.14080). One gather of gradients serves both products that they enter: the weights go into these
gradients where hidden rows were kept, and into the hidden rows where they are made again. Products are handed rows
ungathered, for backends that gather while they multiply. A backend that fuses the activation, or its gradient,
into a product is asked to; of the others the two are composed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jax_latent_moe.activations import activate, activation_of_kept, keeps_hidden
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.grouped_matmul import (
    FusedActivation,
    grouped_matmul,
    matmul_unchecked,
    problem,
    select_fusing,
    wgrad_and_operands,
)
from jax_latent_moe.grouped_matmul.operands import LastColumns, gathered
from jax_latent_moe.routing.permute import DispatchPlan, combine, rows_of

RESIDUAL = "latent_moe_residual"


class Kept(NamedTuple):
    """What a backward pass reads of how hidden rows were made: one of these, the others are None.

    Attributes:
        pre: the pre-activation, [R, m], gated [R, 2 m].
        hidden: hidden rows [R, m], of relu2, whose root tells the slope.
        gate_and_hidden: gate and hidden rows side by side, [R, 2 m], which tell the up half, for kernels that make use
            of that.
    """

    pre: Float[Array, "r p"] | None = None
    hidden: Float[Array, "r m"] | None = None
    gate_and_hidden: Float[Array, "r two_m"] | None = None

    @property
    def rows(self) -> Float[Array, "r p"]:
        """The one that is there."""
        return next(part for part in self if part is not None)

    @property
    def hidden_rows(self) -> "Float[Array, 'r m'] | LastColumns | None":
        """The hidden rows, if they are kept."""
        kept = self.gate_and_hidden
        return self.hidden if kept is None else LastColumns(kept, kept.shape[1] // 2)


def routed_experts(
    config: LatentMoEConfig,
    tokens: Float[Array, "t l"],
    weights: Float[Array, "t k"],
    w_in: Float[Array, "e l *two m"],
    w_out: Float[Array, "e m l"],
    plan: DispatchPlan,
) -> Float[Array, "t l"]:
    """sum_j weights[t, j] * expert_j(tokens[t]) -> [T, l] in the dtype of tokens, summed in float32.

    Args:
        config: read for the activation and the backend.
        tokens: [T, l].
        weights: [T, k], 0 where a choice reaches no expert. Where hidden rows are kept the gradient of a weight that
            is 0 is 0: no score function gives one but by underflow, where the score's slope vanishes too.
        w_in: [E, l, m], gated [E, l, 2, m], in the dtype of tokens.
        w_out: [E, m, l], in the dtype of tokens.
        plan: where each choice stands among the sorted rows.
    """
    return _routed(config, tokens, weights, w_in.reshape(*w_in.shape[:2], -1), w_out, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(config, tokens, weights, w_in, w_out, plan):
    return _forward(config, tokens, weights, w_in, w_out, plan, keep=False)[0]


def _routed_fwd(config, tokens, weights, w_in, w_out, plan):
    combined, kept = _forward(config, tokens, weights, w_in, w_out, plan, keep=True)
    return combined, (tokens, weights, w_in, w_out, plan, kept)


def _forward(config, tokens, weights, w_in, w_out, plan, *, keep):
    kept, hidden = up(config, rows_of(tokens, plan), w_in, w_out, plan.group_sizes, keep=keep)
    out = matmul_unchecked(hidden, w_out, plan.group_sizes, backend=config.backend)
    return combine(out, plan, weights).astype(tokens.dtype), kept


def _routed_bwd(config, residuals, dcombined):
    tokens, weights, w_in, w_out, plan, kept = residuals
    outer = functools.partial(wgrad_and_operands, group_sizes=plan.group_sizes, backend=config.backend)
    row_weights = weights.reshape(-1)[plan.assignment_of_row]

    if (hidden := kept.hidden_rows) is not None:
        # One gather, of weighted gradients, serves both products; <w dout w_out^T, h> over w is the gradient of w.
        dw_out, _, dout = outer(hidden, rows_of(dcombined, plan, weights))
        if _fusing(config, "dgrad", dout, w_out):
            # The kernel may leave the gradient in the place of what was kept, once nobody else reads it.
            kept, dout, dw_out = jax.lax.optimization_barrier((kept, dout, dw_out))
        ones = jnp.ones_like(row_weights)
        dpre, _, products, _ = down_gradient(config, dout, w_out, plan.group_sizes, kept, ones)
        weighted = row_weights != 0
        drow_weights = jnp.where(weighted, products / jnp.where(weighted, row_weights, 1), 0)
    else:
        dpre, weighted_hidden, drow_weights, dout = down_gradient(
            config, rows_of(dcombined, plan), w_out, plan.group_sizes, kept, row_weights
        )
        assert weighted_hidden is not None
        dw_out, _, _ = outer(weighted_hidden, dout)
    # Summed before they are gathered: XLA would gather all that enters each sum.
    drow_weights = jax.lax.optimization_barrier(drow_weights)
    dweights = drow_weights[plan.row_of_assignment].astype(weights.dtype)
    # Rows of tokens are gathered no earlier than they are read.
    dpre, tokens = jax.lax.optimization_barrier((dpre, tokens))
    dw_in, _, _ = outer(rows_of(tokens, plan), dpre)
    drows = grouped_matmul(dpre, w_in, plan.group_sizes, transpose_w=True, backend=config.backend)
    dtokens = combine(drows, plan).astype(tokens.dtype)
    return dtokens, dweights, dw_in, dw_out, None


def up(config, rows, w_in, w_out, group_sizes, *, keep) -> tuple[Kept | None, Float[Array, "r m"] | LastColumns]:
    """What the backward pass reads of the hidden rows' making, None unless it is to be kept; and the hidden rows.

    Args:
        config: read for the activation and the backend.
        rows: [R, l], sorted by expert, gathered or not.
        w_in: [E, l, m], gated [E, l, 2 m].
        w_out: [E, m, l], which the backward pass multiplies gradients with.
        group_sizes: [E].
        keep: whether a backward pass follows.

    Returns:
        Both in the dtype of rows; hidden rows are made of the pre-activation as rounded to it.
    """
    activation, fusing = _fused_activation(config), _fusing(config, "fwd", rows, w_in)
    if keep and fusing is not None and fusing.keeps_gate(activation):
        down = _fusing(config, "dgrad", rows, w_out)
        if down is not None and down.keeps_gate(activation):
            kept, _ = fusing.matmul_activation(rows, w_in, group_sizes, activation=activation, keep_pre=True)
            kept = checkpoint_name(kept, RESIDUAL)
            return Kept(gate_and_hidden=kept), LastColumns(kept, kept.shape[1] // 2)
        fusing = None  # no kernel would read what this one keeps
    if fusing is not None:
        keep_pre = keep and not keeps_hidden(config)
        pre, hidden = fusing.matmul_activation(rows, w_in, group_sizes, activation=activation, keep_pre=keep_pre)
        assert hidden is not None
    else:
        pre = grouped_matmul(rows, w_in, group_sizes, backend=config.backend)
        hidden = activate(pre, config).astype(rows.dtype)
    if not keep:
        return None, hidden
    if keeps_hidden(config):
        hidden = checkpoint_name(hidden, RESIDUAL)
        return Kept(hidden=hidden), hidden
    return Kept(pre=checkpoint_name(pre, RESIDUAL)), hidden


def down_gradient(config, dout, w_out, group_sizes, kept, row_weights):
    """The gradient of the pre-activation and the hidden rows, both times the rows' weights; these weights' gradient.

    Args:
        config: read for the activation and the backend.
        dout: [R, l], gradient of the experts' outputs before they are weighted, gathered or not.
        w_out: [E, m, l].
        group_sizes: [E].
        kept: of `up`; a fusing kernel may leave the gradient in its place.
        row_weights: [R].

    Returns:
        [R, m], gated [R, 2 m], in the dtype of dout; weighted hidden rows [R, m], None where hidden rows were kept;
        <dout w_out^T, hidden>, [R]; and dout, gathered.
    """
    if fusing := _fusing(config, "dgrad", dout, w_out):
        return fusing.matmul_activation_grad(
            dout, w_out, group_sizes, kept.rows, row_weights, activation=_fused_activation(config)
        )
    assert kept.gate_and_hidden is None
    dout = gathered(dout)
    dhidden = grouped_matmul(dout, w_out, group_sizes, transpose_w=True, backend=config.backend)
    hidden, activation_vjp = activation_of_kept(kept.rows, config)
    dhidden = dhidden.astype(hidden.dtype)
    row_weights = row_weights[:, None].astype(hidden.dtype)
    dpre = activation_vjp(row_weights * dhidden)
    weighted_hidden = None if keeps_hidden(config) else (row_weights * hidden).astype(dout.dtype)
    return dpre.astype(dout.dtype), weighted_hidden, jnp.sum(dhidden * hidden, axis=1), dout


def _fusing(config, contraction, rows, w):
    """The backend that fuses the activation into rows x w, or its gradient into rows x w^T; None to compose them."""
    asked = problem(contraction, rows.shape[0], w.shape, rows.dtype, _fused_activation(config))
    return select_fusing(asked, config.backend)


def _fused_activation(config) -> FusedActivation:
    approximate = "_tanh" if config.activation in ("gelu", "geglu") and config.gelu_approximate else ""
    if config.activation != "situ_glu":
        return FusedActivation(config.activation + approximate)
    return FusedActivation("situ_glu", config.situ_beta, config.situ_linear_beta or 0.0)


_routed.defvjp(_routed_fwd, _routed_bwd)
