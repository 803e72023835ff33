"""From tokens to rows sorted by expert and back: the plan, the gather, the weighted combine, the capacity."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe.config import BackendConfig
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.grouped_matmul.operands import GatheredRows
from jax_latent_moe.routing.expert_sort import count_experts, no_expert_last, sort_by_expert

ROW_MULTIPLE = 8
"""Rows that kernels read without padding come in multiples of this."""


class DispatchPlan(NamedTuple):
    """Where each choice (token t, its j-th expert) stands among the rows sorted by expert.

    Attributes:
        group_sizes: [E] int32, rows of each expert. Choices of no expert stand after all of them.
        assignment_of_row: [T * k] int32, the choice t * k + j that each row holds.
        row_of_assignment: [T, k] int32, the row of each choice.
    """

    group_sizes: Int[Array, " e"]
    assignment_of_row: Int[Array, " r"]
    row_of_assignment: Int[Array, "t k"]

    @property
    def token_of_row(self) -> Int[Array, " r"]:
        """[T * k] int32, the token of each row."""
        return self.assignment_of_row // max(self.row_of_assignment.shape[1], 1)


def make_dispatch_plan(
    expert_ids: Int[Array, "t k"], num_experts: int, backend: str | BackendConfig = "auto"
) -> DispatchPlan:
    """Sorts the choices by expert, in token order within one expert.

    Args:
        expert_ids: [T, k]; an id outside [0, num_experts) is no expert.
        num_experts: E.
        backend: of the experts; it may hold a kernel for the sort, whose result is the same.
    """
    sizes, assignment_of_row, row_of_assignment = sort_by_expert(expert_ids, num_experts, backend)
    return DispatchPlan(sizes, assignment_of_row, row_of_assignment.reshape(expert_ids.shape))


def first_rows(plan: DispatchPlan, num_rows: int) -> DispatchPlan:
    """The plan with room for num_rows rows, all that experts have, and for at least one more.

    A choice of no expert reads the last row, which is nobody's either: grouped matmuls leave it zero.
    """
    room = plan.assignment_of_row[: num_rows + ROW_MULTIPLE - num_rows % ROW_MULTIPLE]
    return DispatchPlan(plan.group_sizes, room, jnp.minimum(plan.row_of_assignment, room.size - 1))


def rows_of(
    tokens: Float[Array, "t l"], plan: DispatchPlan, weights: Float[Array, "t k"] | None = None
) -> GatheredRows:
    """The rows that the plan sorts, not gathered yet, each times the weight of its choice: [T, l] -> [T * k, l]."""
    row_weights = None if weights is None else weights.reshape(-1)[plan.assignment_of_row]
    return GatheredRows(tokens, plan.token_of_row, row_weights)


def combine(
    rows: Float[Array, "r l"], plan: DispatchPlan, weights: Float[Array, "t k"] | None = None
) -> Float[Array, "t l"]:
    """Weighted sum of each token's rows, in a fixed order: [T * k, l] -> [T, l]; without weights, the plain sum.

    The sum runs in the wider of float32 and the rows' type and is returned in it.
    """
    wide = at_least_float32(rows.dtype)
    total = jnp.zeros((plan.row_of_assignment.shape[0], rows.shape[1]), wide)
    # One gather a choice fuses into the sum; one gather of all would write T * k rows first.
    for choice in range(plan.row_of_assignment.shape[1]):
        part = _take(rows, plan.row_of_assignment[:, choice]).astype(wide)
        total += part if weights is None else weights[:, choice, None].astype(wide) * part
    return total


def within_capacity(
    expert_ids: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    num_experts: int,
    capacity: int | Int[Array, ""],
    policy: str,
) -> Bool[Array, "t k"]:
    """Which choices an expert of limited capacity keeps (Megatron's token dropping).

    Args:
        expert_ids: [T, k]; an id outside [0, num_experts) is no expert and is not kept.
        weights: [T, k], read by policy "probs".
        num_experts: E.
        capacity: choices that one expert keeps.
        policy: "probs" keeps the largest weights, the earlier token first among equals; "position" the first tokens.
    """
    expert = no_expert_last(expert_ids.reshape(-1), num_experts)
    keys = (expert,) if policy == "position" else (-lax.stop_gradient(weights).reshape(-1), expert)
    order = jnp.lexsort(keys)
    sizes = count_experts(expert_ids, num_experts)
    first = jnp.append(jnp.cumsum(sizes) - sizes, jnp.sum(sizes))[expert[order]]
    rank = jnp.zeros_like(expert).at[order].set(jnp.arange(expert.size) - first, unique_indices=True)
    return ((rank < capacity) & (expert < num_experts)).reshape(expert_ids.shape)


def _take(rows, indices):
    return jnp.asarray(rows).at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)
