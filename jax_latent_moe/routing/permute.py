"""Tokens to rows sorted by expert, and back: the plan, the gather, the weighted combine, the capacity."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.formats import ScaledRows
from jax_latent_moe.grouped_matmul.operands import GatheredRows
from jax_latent_moe.routing.expert_sort import count_experts, int32_ids, no_expert_last, sort_by_expert

ROW_MULTIPLE = 8
"""Kernels read a multiple of this number of rows without padding."""


class DispatchPlan(NamedTuple):
    """The row of each assignment (token t, its j-th expert), with rows sorted by expert.

    Attributes:
        group_sizes: [E] int32, rows of each expert. The rows of assignments to no expert follow the experts' rows.
        assignment_of_row: [R] int32, the assignment t * k + j that each row holds.
        row_of_assignment: [T, k] int32, the row of each assignment.
        padding: [R], True for padding rows, which fill an expert up to a multiple or to its capacity. A padding row
            repeats another row. None if there are no padding rows.
        expert_ids: [T, k] int32, the expert of each assignment, outside [0, E) for none. None if the plan was
            changed after `make_dispatch_plan`.
    """

    group_sizes: Int[Array, " e"]
    assignment_of_row: Int[Array, " r"]
    row_of_assignment: Int[Array, "t k"]
    padding: Bool[Array, " r"] | None = None
    expert_ids: Int[Array, "t k"] | None = None

    @property
    def token_of_row(self) -> Int[Array, " r"]:
        """[R] int32, the token of each row."""
        return lax.div(self.assignment_of_row, jnp.int32(max(self.row_of_assignment.shape[1], 1)))

    def weights_of_rows(self, weights: Float[Array, "t k"]) -> Float[Array, " r"]:
        """[R], the weight of each row's assignment, 0 for padding rows."""
        row_weights = weights.reshape(-1)[self.assignment_of_row]
        return row_weights if self.padding is None else jnp.where(self.padding, 0, row_weights)


def make_dispatch_plan(
    expert_ids: Int[Array, "t k"], num_experts: int, backend="auto", row_multiple: int = 1
) -> DispatchPlan:
    """Sorts the assignments by expert, in token order within one expert.

    Args:
        expert_ids: [T, k]; an id outside [0, num_experts) is no expert.
        num_experts: E.
        backend: the experts' backend. If it has a kernel for the sort, that kernel runs; the result is the same.
        row_multiple: each expert's rows begin at a multiple of this number, for formats whose blocks run along rows
            (`Format.row_multiple`). R is T * k, plus row_multiple - 1 for each expert that can have rows.
    """
    sizes, assignment_of_row, row_of_assignment = sort_by_expert(expert_ids, num_experts, backend)
    plan = DispatchPlan(
        sizes, assignment_of_row, row_of_assignment.reshape(expert_ids.shape), expert_ids=int32_ids(expert_ids)
    )
    return plan if row_multiple == 1 else _padded(plan, row_multiple)


def _padded(plan: DispatchPlan, multiple: int) -> DispatchPlan:
    """The plan with padding rows that fill each expert up to a multiple."""
    sizes, (num_assignments,) = plan.group_sizes, plan.assignment_of_row.shape
    experts = sizes.shape[0]
    num_rows = padded_rows(num_assignments, experts, multiple)
    padded = -(-sizes // multiple) * multiple
    ends, padded_ends = jnp.cumsum(sizes), jnp.cumsum(padded)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    # Assignments to no expert and the remaining rows form one more group.
    group = jnp.searchsorted(padded_ends, row, side="right").astype(jnp.int32)
    starts, padded_starts = (jnp.append(jnp.zeros(1, jnp.int32), part) for part in (ends, padded_ends))
    counts = jnp.append(sizes, num_assignments - ends[-1])
    place = row - padded_starts[group]
    source = starts[group] + jnp.clip(place, 0, jnp.maximum(counts[group] - 1, 0))
    source = jnp.minimum(source, num_assignments - 1)
    owner = jnp.searchsorted(ends, plan.row_of_assignment, side="right")
    return DispatchPlan(
        padded,
        plan.assignment_of_row[source],
        (plan.row_of_assignment - starts[owner] + padded_starts[owner]).astype(jnp.int32),
        place >= counts[group],
    )


def padded_rows(assignments: int, experts: int, multiple: int) -> int:
    """R of a plan whose experts' rows begin at a multiple: enough however the assignments are spread."""
    return assignments + min(experts, assignments) * (multiple - 1)


def first_rows(plan: DispatchPlan, num_rows: int) -> DispatchPlan:
    """The plan cut to num_rows rows, which hold all rows of experts, plus at least one row without an expert.

    An assignment to no expert reads the last row, which grouped matmuls leave zero.
    """
    sizes, assignment_of_row, row_of_assignment, padding, _ = plan
    num_rows = kept_rows(num_rows, row_of_assignment.size, assignment_of_row.size)
    kept = assignment_of_row[:num_rows]
    padding = None if padding is None else padding[:num_rows]
    return DispatchPlan(sizes, kept, jnp.minimum(row_of_assignment, kept.size - 1), padding)


def rows_from(
    plan: DispatchPlan, begin: int | Int[Array, ""], num_rows: int
) -> tuple[DispatchPlan, Bool[Array, "t k"]]:
    """The plan of num_rows rows from `begin` on, and which assignments have one of these rows.

    `ROW_MULTIPLE` rows without an expert follow. An assignment with another row reads the last of them, which grouped
    matmuls leave zero.
    """
    sizes, assignment_of_row, row_of_assignment, padding, _ = plan
    ends = jnp.cumsum(sizes)
    own = jnp.clip(ends, begin, begin + num_rows) - jnp.clip(ends - sizes, begin, begin + num_rows)
    rows = jnp.arange(num_rows + ROW_MULTIPLE, dtype=jnp.int32)
    source = jnp.minimum(begin + rows, assignment_of_row.size - 1)
    place = row_of_assignment - begin
    inside = (place >= 0) & (place < num_rows)
    padding = None if padding is None else _take(padding, source)
    place = jnp.where(inside, place, rows.size - 1).astype(jnp.int32)
    return DispatchPlan(own.astype(sizes.dtype), _take(assignment_of_row, source), place, padding), inside


def kept_rows(num_rows: int, assignments: int, allocated: int) -> int:
    """R of `first_rows` for a plan of `allocated` rows, of which all but the assignments are padding rows."""
    num_rows += allocated - assignments
    return min(allocated, num_rows + ROW_MULTIPLE - num_rows % ROW_MULTIPLE)


def filled_to_capacity(plan: DispatchPlan, capacity: int, spare: int) -> DispatchPlan:
    """The plan with exactly `capacity` rows for each expert (Megatron's moe_pad_expert_input_to_capacity).

    R is E * capacity + `ROW_MULTIPLE`. An assignment to no expert reads one of the last rows, which grouped matmuls
    leave zero.

    Args:
        plan: no expert has more than `capacity` rows.
        capacity: rows per expert.
        spare: the assignment that padding rows hold. Its token must be zero: a padding row of an expert without tokens
            would otherwise carry a NaN of its token to that expert's gradient.
    """
    sizes, assignment_of_row, row_of_assignment, padding, _ = plan
    assert padding is None
    experts, (num_assignments,) = sizes.shape[0], assignment_of_row.shape
    starts = jnp.cumulative_sum(sizes, include_initial=True, dtype=jnp.int32)
    place = jnp.arange(capacity, dtype=jnp.int32)[None]
    source = jnp.minimum(starts[:-1, None] + place, num_assignments - 1)
    filled = jnp.where(place < sizes[:, None], _take(assignment_of_row, source), spare).reshape(-1)
    rest = jnp.full(ROW_MULTIPLE, spare, jnp.int32)
    owner = jnp.searchsorted(starts[1:], row_of_assignment, side="right").astype(jnp.int32)
    new_row = jnp.where(owner < experts, row_of_assignment - _take(starts, owner) + owner * capacity, filled.size)
    rows = jnp.concatenate([filled, rest])
    return DispatchPlan(jnp.full_like(sizes, capacity), rows, new_row.astype(jnp.int32), rows == spare)


def rows_of(
    tokens: Float[Array, "t l"] | ScaledRows, plan: DispatchPlan, weights: Float[Array, "t k"] | None = None
) -> GatheredRows:
    """The sorted rows, each times the weight of its assignment: [T, l] -> [R, l]. They are not gathered yet."""
    return GatheredRows(tokens, plan.token_of_row, None if weights is None else plan.weights_of_rows(weights))


def combine(
    rows: Float[Array, "r l"], plan: DispatchPlan, weights: Float[Array, "t k"] | None = None
) -> Float[Array, "t l"]:
    """The weighted sum of each token's rows, in a fixed order: [R, l] -> [T, l]. Without weights, the plain sum.

    The sum is computed and returned in the wider of float32 and the rows' dtype.
    """
    wide = at_least_float32(rows.dtype)
    total = jnp.zeros((plan.row_of_assignment.shape[0], rows.shape[1]), wide)
    # A gather per choice fuses into the sum. One gather of all choices would first write T * k rows.
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
    """The assignments that experts of limited capacity keep (Megatron's token dropping).

    Args:
        expert_ids: [T, k]; an id outside [0, num_experts) is no expert and is not kept.
        weights: [T, k], read by policy "probs".
        num_experts: E.
        capacity: assignments that one expert keeps.
        policy: "probs" keeps the largest weights, and the earlier token of equal ones. "position" keeps the first
            tokens.
    """
    expert = no_expert_last(expert_ids.reshape(-1), num_experts)
    keys = (expert,) if policy == "position" else (-lax.stop_gradient(weights).reshape(-1), expert)
    order = jnp.lexsort(keys)
    sizes = count_experts(expert_ids, num_experts)
    first = jnp.cumulative_sum(sizes, include_initial=True, dtype=sizes.dtype)[expert[order]]
    place = jnp.arange(expert.size, dtype=expert.dtype) - first
    rank = jnp.zeros_like(expert).at[order].set(place, unique_indices=True)
    return ((rank < capacity) & (expert < num_experts)).reshape(expert_ids.shape)


def _take(rows, indices):
    return jnp.asarray(rows).at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)
