"""The rows of a device's experts in rounds of bounded size.

How many rows a device's experts get is known only when a step runs. On n devices, arrays for the worst case hold up to
n times the mean. Here they hold little more than the mean, and one round is usually enough. If the experts of a device
get more rows, further rounds follow until all are computed, so no row is dropped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jax_latent_moe.derivatives import refused_if_differentiated
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.low_rank import LowRank
from jax_latent_moe.routing.permute import DispatchPlan, rows_from

Compute = Callable[[PyTree, Float[Array, "t l"], Float[Array, "t k"], DispatchPlan], Float[Array, "t l"]]


def in_rounds(
    compute: Compute,
    num_rows: int,
    weights_of_experts: PyTree,
    tokens: Float[Array, "t l"],
    weights: Float[Array, "t k"],
    plan: DispatchPlan,
) -> Float[Array, "t l"]:
    """compute(weights_of_experts, tokens, weights, plan) in rounds of num_rows rows, [T, l].

    The first round keeps what its backward pass needs. The others compute it again. Each further round rounds the sum
    of a token, and the gradient of a weight, once more to its dtype. There are first derivatives in reverse mode alone.

    Args:
        compute: the weighted sums of the experts' outputs, linear in the rows. It runs no collective.
        num_rows: rows of a round, a multiple of `ROW_MULTIPLE` and of the multiple at which experts' rows begin.
        weights_of_experts: weights and biases. `ScaledArray` leaves and the bases of `LowRank` leaves get no gradient.
        tokens: [T, l].
        weights: [T, k].
        plan: the plan of all rows.
    """
    frozen = jax.tree.map(_frozen, weights_of_experts, is_leaf=_is_weight)
    trained = jax.tree.map(_trained, weights_of_experts, is_leaf=_is_weight)
    return _in_rounds(compute, num_rows, frozen, trained, tokens, weights, plan)


def _is_weight(leaf) -> bool:
    return leaf is None or isinstance(leaf, ScaledArray | LowRank)


def _frozen(leaf) -> Any:
    if isinstance(leaf, LowRank):
        return leaf.frozen
    return leaf if isinstance(leaf, ScaledArray) else None


def _trained(leaf) -> Any:
    if isinstance(leaf, LowRank):
        return leaf.adapter
    return None if isinstance(leaf, ScaledArray) else leaf


def _joined(frozen, trained) -> Any:
    return trained.with_base(frozen.base) if isinstance(frozen, LowRank) else trained if frozen is None else frozen


def _round(compute, num_rows, frozen, plan, index):
    """A round as a function of what is differentiated."""

    def run(trained, tokens, weights):
        some, inside = rows_from(plan, index * num_rows, num_rows)
        joined = jax.tree.map(_joined, frozen, trained, is_leaf=_is_weight)
        return compute(joined, tokens, jnp.where(inside, weights, 0), some)

    return run


def _other_rounds(num_rows, plan, add, start):
    """`start` after add(i, value) for each further round i."""
    total = jnp.sum(plan.group_sizes, dtype=jnp.int32)

    def body(state):
        index, value = state
        return index + 1, add(index, value)

    return lax.while_loop(lambda state: state[0] * num_rows < total, body, (jnp.int32(1), start))[1]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_rounds(compute, num_rows, frozen, trained, tokens, weights, plan):
    round_of = partial(_round, compute, num_rows, frozen, plan)
    first = round_of(0)(trained, tokens, weights)
    return _other_rounds(num_rows, plan, lambda i, sums: sums + round_of(i)(trained, tokens, weights), first)


def _in_rounds_fwd(compute, num_rows, frozen, trained, tokens, weights, plan):
    round_of = partial(_round, compute, num_rows, frozen, plan)
    first, pullback = jax.vjp(round_of(0), trained, tokens, weights)
    out = _other_rounds(num_rows, plan, lambda i, sums: sums + round_of(i)(trained, tokens, weights), first)
    return out, (pullback, frozen, trained, tokens, weights, plan)


def _in_rounds_bwd(compute, num_rows, residuals, dout):
    pullback, frozen, trained, tokens, weights, plan = residuals

    def add(i, grads):
        _, pullback = jax.vjp(_round(compute, num_rows, frozen, plan, i), trained, tokens, weights)
        return jax.tree.map(jnp.add, grads, pullback(dout))

    grads = _other_rounds(num_rows, plan, add, pullback(dout))
    return None, *refused_if_differentiated(_ONCE, grads), None


_ONCE = (
    "A layer whose experts compute their rows in rounds has first derivatives in reverse mode alone: set "
    "parallel.round_factor=None for second ones."
)


_in_rounds.defvjp(_in_rounds_fwd, _in_rounds_bwd)
