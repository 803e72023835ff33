"""The routed experts on latent rows: gather, two grouped matmuls around an activation, weighted combine.

One differentiation rule covers the whole block. It keeps the tokens, the routing and one residual of the activation.
The backward pass gathers rows again, unless config.keep_gathered_rows keeps them. It does not need the experts'
outputs, because the gradient of a combine weight is <dcombined w_out^T, hidden>, as in SonicMoE (arXiv 2512.14080). The
gradient of its logarithm is the same with dcombined times the weight. `plan_experts` decides what runs each product and
which residual is kept. An activation that no kernel fuses is computed here.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import custom_vjp_primal_tree_values
from jaxtyping import Array, Float

from jax_latent_moe.activations import activate, hidden_and_pullback
from jax_latent_moe.adapted_experts import adapted_experts
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.decode import Decode, decoded_experts, plan_decode
from jax_latent_moe.derivatives import gradients_of_perturbed, refused_if_differentiated, vjp_of_perturbed
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.expert_biases import Biases, plus_bias, times_bias
from jax_latent_moe.expert_plan import ExpertPlan, plan_experts
from jax_latent_moe.formats import ScaledArray, ScaledRows
from jax_latent_moe.grouped_matmul import Bound, LastColumns, Operands, Outputs, operand_of
from jax_latent_moe.grouped_matmul.operands import gathered
from jax_latent_moe.low_rank import LowRank
from jax_latent_moe.precision import Codes, Precision, encode_weights
from jax_latent_moe.projections import cluster_parts, projection, refusal_of_projections
from jax_latent_moe.projections import explain as explain_projections
from jax_latent_moe.routing.compiled import compiled_runs
from jax_latent_moe.routing.permute import DispatchPlan, combine, rows_of
from jax_latent_moe.varying import varying

RESIDUAL = "latent_moe_residual"
Weight = Float[Array, "e a b"] | ScaledArray
Adapted = Weight | LowRank


def routed_experts(
    config: LatentMoEConfig,
    tokens: Float[Array, "t l"],
    weights: Float[Array, "t k"],
    w_in: Float[Array, "e l *two m"] | ScaledArray | LowRank,
    w_out: Adapted,
    dispatch: DispatchPlan,
    biases: Biases | None = None,
    codes: Codes | None = None,
    log_weights: Float[Array, "t k"] | None = None,
    up_proj: Float[Array, "l d"] | None = None,
) -> Float[Array, "t l"] | Float[Array, "t d"]:
    """sum_j weights[t, j] * expert_j(tokens[t]) -> [T, l] in the dtype of tokens, summed in float32.

    Args:
        config: gives the activation and the backend.
        tokens: [T, l].
        weights: [T, k], 0 for an assignment that no expert computes.
        w_in: [E, l, m], or [E, l, 2, m] if gated, in the dtype of tokens; or a `ScaledArray` of shape [E, l, m] or
            [E, l, 2 m], which gets no gradient; or a `LowRank` of either.
        w_out: [E, m, l], in the dtype of tokens; or a `ScaledArray`, which gets no gradient; or a `LowRank` of either.
        dispatch: maps assignments to rows sorted by expert.
        biases: b_in [E, m], or [E, 2, m] if gated, and b_out [E, l], in the dtype of tokens. Each is added after its
            product. config.expert_bias says whether there are any.
        codes: `encode_weights` of w_in and w_out, perhaps from a wider dtype. None encodes them here.
        log_weights: if given, it may take the gradients of the weights' logarithms, and weights then get none. Its
            values are not read. Such a gradient is <weights[t, j] dcombined, expert_j>, so the products of the backward
            pass all read the same rows. `ExpertPlan.weighted_dgrad` says whether they do.
        up_proj: [l, d] in the dtype of tokens, multiplies the sum, so the result is [T, d]. None returns the sum.

    Raises:
        UnsupportedError: the named backend cannot run one of the products.
        InputError: config.precision does not go with the format of the weights, or with adapters.
    """
    arrays = tokens, weights, w_in, w_out, dispatch, biases, codes, log_weights, up_proj
    tokens, weights, w_in, w_out, dispatch, biases, codes, log_weights, up_proj = varying(arrays, arrays)
    if biases is not None:
        biases = biases[0].reshape(biases[0].shape[0], -1), biases[1]
    if isinstance(w_in, LowRank) or isinstance(w_out, LowRank):
        out = adapted_experts(config, tokens, weights, w_in, w_out, biases, dispatch)
        return out if up_proj is None else projection(config, out, up_proj)
    w_in = flat(w_in)
    if codes is None:
        codes = encoded(config, w_in, w_out)
    decode = projections = None
    if dispatch.expert_ids is not None:
        count, choices = dispatch.expert_ids.shape
        decode = plan_decode(config, count, choices, tokens.dtype, w_in, w_out)
        projections = explain_projections(config, count)
    plan = plan_experts(
        config,
        dispatch.assignment_of_row.shape[0],
        w_in.shape,
        w_out.shape,
        tokens.dtype,
        w_in=operand_of(w_in),
        w_out=operand_of(w_out),
        by_log=log_weights is not None,
        decode=decode,
        projections=projections,
    )
    if not isinstance(decode, Decode):
        dispatch = dispatch._replace(expert_ids=None)
    log_weights = log_weights if plan.weighted_dgrad else None
    arrays = tokens, weights, log_weights, w_in, w_out, codes, biases, dispatch
    if up_proj is None:
        return _routed(plan, *arrays)
    joins = isinstance(decode, Decode) and not decode.rows
    if not joins or refusal_of_projections(config, tokens, None, up_proj) is not None:
        return projection(config, _routed(plan, *arrays), up_proj)
    return _routed_and_projected(plan, cluster_parts(up_proj), up_proj, *arrays)


def encoded(config: LatentMoEConfig, w_in, w_out: Weight) -> Codes:
    """`encode_weights` in config.precision, of w_in [..., E, l, m], or [..., E, l, 2 m] if gated, and w_out."""
    precision, compiled = config.precision or Precision(), compiled_runs(config.backend)
    return encode_weights(precision, w_in, w_out, gated=config.gated, compiled=compiled)


def flat(weight):
    """A dense weight as [E, in, out]: gate and up side by side."""
    return weight if isinstance(weight, ScaledArray) else weight.reshape(*weight.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(plan, tokens, weights, log_weights, w_in, w_out, codes, biases, dispatch):
    del log_weights
    if isinstance(plan.decode, Decode):
        return decoded_experts(plan.decode, tokens, weights, dispatch.expert_ids, w_in, w_out)
    b_in, b_out = biases or (None, None)
    hidden = _up(plan, plan.up_without_gradient, tokens, w_in, codes, b_in, dispatch).out
    return _down(plan, tokens, weights, hidden, w_out, codes, b_out, dispatch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _routed_and_projected(plan, parts, up_proj, *arrays):
    tokens, weights, _, w_in, w_out, _, _, dispatch = arrays
    return decoded_experts(plan.decode, tokens, weights, dispatch.expert_ids, w_in, w_out, up_proj, parts)


def _routed_and_projected_fwd(plan, parts, up_proj, *arrays):
    del parts
    return vjp_of_perturbed(lambda up_proj, *arrays: _routed(plan, *arrays) @ up_proj, up_proj, *arrays)


def _routed_and_projected_bwd(plan, parts, residuals, dout):
    del plan, parts
    return gradients_of_perturbed(residuals, dout)


_routed_and_projected.defvjp(_routed_and_projected_fwd, _routed_and_projected_bwd, symbolic_zeros=True)


def _routed_fwd(plan, *arrays):
    *_, w_out, _, _, _ = arrays
    trains_out = any(array.perturbed for array in jax.tree.leaves(w_out))
    # Constants may still be NumPy's.
    arrays = jax.tree.map(jnp.asarray, custom_vjp_primal_tree_values(arrays))
    tokens, weights, _, w_in, w_out, codes, biases, dispatch = arrays
    b_in, b_out = biases or (None, None)
    made = _up(plan, plan.up, tokens, w_in, codes, b_in, dispatch)
    kept = checkpoint_name(made.residual, RESIDUAL)
    read = checkpoint_name(made.lhs, RESIDUAL) if plan.keeps_rows else tokens
    made_whole = plan.residual == "pre" or isinstance(made.out, ScaledRows)
    hidden = made.out if made_whole else hidden_rows(plan, kept)
    out = _down(plan, tokens, weights, hidden, w_out, codes, b_out, dispatch)
    # The backward pass reads either the transposed weights' codes or the weights.
    codes = codes._replace(fwd_in=None, fwd_out=None)
    w_in, w_out = (w if of_w is None else None for w, of_w in ((w_in, codes.dgrad_in), (w_out, codes.dgrad_out)))
    dispatch = dispatch._replace(expert_ids=None)
    # Residuals are arrays, but None is a part of their structure.
    return out, (read, weights, w_in, w_out, codes, b_out, dispatch, kept, () if trains_out else None)


def _up(plan, product, tokens, w_in, codes, b_in, dispatch):
    rows = rows_of(_encoded(tokens, plan.encode_tokens), dispatch)
    return up(plan, product, rows, w_in if codes.fwd_in is None else codes.fwd_in, dispatch.group_sizes, b_in)


def _down(plan, tokens, weights, hidden, w_out, codes, b_out, dispatch):
    if codes.fwd_out is not None:
        hidden, w_out = _encoded(gathered(hidden), plan.encode_hidden), codes.fwd_out
    out = plus_bias(plan.down(Operands(hidden, w_out, dispatch.group_sizes)).out, b_out, dispatch.group_sizes)
    return combine(out, dispatch, weights).astype(tokens.dtype)


def _encoded(rows, encoder):
    return rows if encoder is None or isinstance(rows, ScaledRows) else encoder(rows)


def _routed_bwd(plan, residuals, dcombined):
    read, weights, w_in, w_out, codes, b_out, dispatch, kept, trains_out = residuals
    sizes, format = dispatch.group_sizes, plan.precision.dgrad
    row_weights = dispatch.weights_of_rows(weights)

    dout = rows_of(_encoded(dcombined, plan.encode_dout), dispatch)
    dw_out = None
    # XLA could not leave out a product that nothing needs: what follows reads its rows, or waits for it.
    down_wgrad = None if trains_out is None else plan.down_wgrad
    if down_wgrad is None and plan.weighted_dgrad:
        dout, row_weights = gathered(rows_of(dcombined, dispatch, weights)), jnp.ones_like(row_weights)
    elif plan.residual != "pre" and down_wgrad is not None:
        hidden, rows = hidden_rows(plan, kept), rows_of(dcombined, dispatch, weights)
        if plan.weighted_hidden:
            hidden, rows = _weighted(gathered(hidden), row_weights), rows_of(dcombined, dispatch)
        made = down_wgrad(Operands(hidden, rows, sizes))
        dw_out = made.out
        if plan.weighted_dgrad:
            dout, row_weights = made.rhs, jnp.ones_like(row_weights)
        if plan.down_dgrad.problem.epilogue is not None:
            # The kernel may overwrite the residual with the gradient, so wgrad must read the residual first.
            kept, dw_out = jax.lax.optimization_barrier((kept, dw_out))
    factors = jnp.ones_like(row_weights) if plan.weighted_tokens else row_weights
    outputs = down_gradient(plan, dout, w_out if format is None else codes.dgrad_out, sizes, kept, factors)
    # A weight's or a bias's gradient reads the rows that a kernel gathered, unless they are codes.
    dout = outputs.lhs if format is None else rows_of(dcombined, dispatch)
    if plan.residual == "pre" and down_wgrad is not None:
        hidden = outputs.hidden
        if plan.weighted_tokens:
            assert hidden is not None
            hidden = _weighted(hidden, row_weights)
        dw_out = down_wgrad(Operands(hidden, dout, sizes)).out
    dpre, drow_weights = outputs.out, outputs.row_weight_gradients
    assert drow_weights is not None
    dbiases = None
    if b_out is not None:
        dout = gathered(dout)
        drow_weights = drow_weights + times_bias(dout, b_out, sizes)
        dbiases = _bias_gradients(plan, dpre, dout, row_weights, sizes)
    # The barrier makes XLA sum before it gathers. Without it, XLA gathers all terms of each sum.
    drow_weights = jax.lax.optimization_barrier(drow_weights)
    dweights = drow_weights[dispatch.row_of_assignment].astype(weights.dtype)
    if not plan.keeps_rows:
        # The barrier keeps XLA from gathering the tokens' rows earlier than they are read.
        dpre, tokens = jax.lax.optimization_barrier((dpre, read))
        read = rows_of(tokens, dispatch, weights if plan.weighted_tokens else None)
    elif plan.weighted_tokens:
        read = _weighted(read, row_weights)
    dw_in = None if plan.up_wgrad is None else plan.up_wgrad(Operands(read, dpre, sizes)).out
    rows = _encoded(dpre, plan.encode_dpre) if outputs.codes is None else outputs.codes
    drows = plan.up_dgrad(Operands(rows, w_in if format is None else codes.dgrad_in, sizes)).out
    dtokens = combine(drows, dispatch, weights if plan.weighted_tokens else None).astype(drows.dtype)
    grads = dtokens, *((None, dweights) if plan.weighted_dgrad else (dweights, None)), dw_in, dw_out
    if plan.precision != Precision():
        # Codes are integers, so a derivative of this would miss everything that passes through them.
        grads = refused_if_differentiated(_ONCE.format(plan.precision), grads)
    return *grads, None, dbiases, None


_ONCE = (
    "{} has first derivatives in reverse mode alone: set precision=None for second ones, and for forward mode by "
    "transposing twice."
)


_routed.defvjp(_routed_fwd, _routed_bwd, symbolic_zeros=True)


def hidden_rows(plan: ExpertPlan, kept: Float[Array, "r p"]) -> Float[Array, "r m"] | LastColumns:
    """The hidden rows in a residual that holds only them, or them after the gate."""
    return LastColumns(kept, kept.shape[1] // 2) if plan.residual == "gate_hidden" else kept


def _bias_gradients(plan, dpre, dout, row_weights, group_sizes) -> Biases:
    """The sums over each expert's rows, as products with a column: no scatter, and the same bits each time."""
    factors = row_weights[:, None].astype(dout.dtype)
    of_dpre = factors if plan.weighted_tokens else jnp.ones_like(factors)
    db_in, db_out = (
        product(Operands(column, rows, group_sizes)).out[:, 0]
        for product, column, rows in ((plan.b_in_grad, of_dpre, dpre), (plan.b_out_grad, factors, dout))
    )
    return db_in, db_out


def _weighted(rows: Float[Array, "r n"], row_weights: Float[Array, " r"]) -> Float[Array, "r n"]:
    """The rows times their weights, rounded once."""
    wide = at_least_float32(rows.dtype)
    return (row_weights[:, None].astype(wide) * rows.astype(wide)).astype(rows.dtype)


def up(plan: ExpertPlan, product: Bound, rows, w_in: Weight, group_sizes, b_in=None) -> Outputs:
    """The hidden rows [R, m] and the plan's residual. The pre-activation is rounded to the dtype of the rows.

    The hidden rows are `ScaledRows` if the product encodes them. lhs has the rows as a dense array.

    Args:
        plan: the experts' plan.
        product: plan.up or plan.up_without_gradient.
        rows: [R, l], sorted by expert, as an array or as `GatheredRows`.
        w_in: [E, l, m], or [E, l, 2 m] if gated.
        group_sizes: [E].
        b_in: [E, m], or [E, 2 m] if gated; None without biases.
    """
    outputs = product(Operands(rows, w_in, group_sizes))
    if product.problem.epilogue is not None:
        return outputs
    pre = plus_bias(outputs.out, b_in, group_sizes)
    hidden = activate(pre, plan.activation).astype(pre.dtype)
    return Outputs(hidden, residual=pre if plan.residual == "pre" else hidden, lhs=outputs.lhs)


def down_gradient(plan: ExpertPlan, dout, w_out: Weight, group_sizes, kept, row_weights) -> Outputs:
    """The gradient of the pre-activation and, if the residual is "pre", the hidden rows, both times the rows' weights.

    Args:
        plan: the experts' plan.
        dout: [R, l], the gradient of the experts' outputs, as an array or as `GatheredRows`.
        w_out: [E, m, l].
        group_sizes: [E].
        kept: the plan's residual. A kernel may overwrite it with the gradient.
        row_weights: [R], or ones if dout is multiplied by the rows' weights already, or if what follows is.

    Returns:
        The `Outputs` of a dgrad with the gradient in its epilogue, with dout as a dense array in lhs, and with the
        gradient's codes if that epilogue or plan.gradient makes them.
    """
    outputs = plan.down_dgrad(Operands(dout, w_out, group_sizes, kept, row_weights))
    if plan.down_dgrad.problem.epilogue is not None:
        return outputs
    if plan.gradient is not None and plan.gradient.refusal is None:
        dpre, codes, sums = plan.gradient(outputs.out, kept, row_weights)
        return Outputs(dpre, row_weight_gradients=sums, lhs=outputs.lhs, codes=codes)
    dtype = outputs.out.dtype
    hidden, pullback = hidden_and_pullback(kept, plan.residual, plan.activation)
    dhidden = outputs.out.astype(hidden.dtype)
    row_weights = row_weights[:, None].astype(hidden.dtype)
    dpre = pullback(row_weights * dhidden).astype(dtype)
    weighted_hidden = (row_weights * hidden).astype(dtype) if plan.residual == "pre" else None
    return Outputs(
        dpre,
        hidden=weighted_hidden,
        row_weight_gradients=jnp.sum(dhidden * hidden, axis=1),
        lhs=outputs.lhs,
    )
