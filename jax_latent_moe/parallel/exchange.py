"""Sends latents to the devices that hold their experts, and the results back. Three strategies give the same values.

A device multiplies the results by their weights before it sends them, so only sums of rows of latent width come back.
Each movement of rows is a gather whose gradient is another gather. There is no scatter, so two runs give the same bits.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PyTree

from jax_latent_moe import cost
from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.dtypes import at_least_float32
from jax_latent_moe.parallel.choice import choose_dispatch
from jax_latent_moe.parallel.round_trip import RoundTrip, to_experts, to_tokens
from jax_latent_moe.parallel.rounds import Compute, in_rounds
from jax_latent_moe.routing.expert_sort import count_experts
from jax_latent_moe.routing.permute import first_rows, make_dispatch_plan, within_capacity
from jax_latent_moe.routing.router import CHOICE, NO_EXPERT
from jax_latent_moe.shards import sum_used_alike


def exchange(
    config: LatentMoEConfig,
    axis: str,
    compute: Compute,
    weights_of_experts: PyTree,
    latent: Float[Array, "t l"],
    expert_ids: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    *,
    row_multiple: int = 1,
) -> tuple[Float[Array, "t l"], Int[Array, " e"]]:
    """sum_j weights[t, j] * expert_j(latent[t]), with the experts split over a mesh axis. It runs under shard_map.

    Args:
        config: the layer. Its `parallel` says how rows travel, and how many may.
        axis: the mesh axis that splits the experts into equal runs.
        compute: maps (weights_of_experts, rows [T, l], weights [T, k], a plan of this device's experts) to [T, l].
        weights_of_experts: those of this device's experts, with their biases.
        latent: [T, l], of this device's tokens.
        expert_ids: [T, k], indices of all physical experts.
        weights: [T, k], 0 where there is no expert.
        row_multiple: the multiple at which each expert's rows begin.

    Returns:
        [T, l], and for each physical expert the number of this device's rows that capacity dropped, int32. They are
        the same for every dispatch.

    Raises:
        UnsupportedError: the named dispatch does not run on this platform.
    """
    assert config.parallel is not None
    devices, (tokens, k) = lax.axis_size(axis), expert_ids.shape
    local_experts = config.num_physical_experts // devices
    capacity = cost.exchange_capacity(config, devices, tokens, config.parallel.capacity_factor)
    dropped = jnp.zeros(config.num_physical_experts, jnp.int32)
    if capacity < tokens * min(k, local_experts):
        kept = within_capacity(expert_ids // local_experts, weights, devices, capacity, "probs")
        kept = checkpoint_name(kept, CHOICE)
        dropped = count_experts(jnp.where(kept, NO_EXPERT, expert_ids), config.num_physical_experts, config.backend)
        expert_ids, weights = jnp.where(kept, expert_ids, NO_EXPERT), jnp.where(kept, weights, 0)
    move = {"all_gather": _all_gather, "all_to_all": _all_to_all, "ragged_all_to_all": _ragged_all_to_all}
    strategy = choose_dispatch(config, devices, tokens)
    format = config.parallel.dispatch_format
    plan_of = partial(make_dispatch_plan, backend=config.backend)
    round_of = partial(cost.rows_of_round, config, devices, tokens, row_multiple=row_multiple)
    plan_of_experts = partial(plan_of, row_multiple=row_multiple)
    experts_of = partial(_experts_of, compute, weights_of_experts, plan_of_experts, round_of)
    combined = move[strategy](plan_of, axis, capacity, local_experts, experts_of, format, latent, expert_ids, weights)
    return combined, dropped


def own_experts_of_all(
    config: LatentMoEConfig,
    axis: str,
    compute: Compute,
    weights_of_experts: PyTree,
    latent: Float[Array, "t l"],
    expert_ids: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    *,
    row_multiple: int = 1,
) -> Float[Array, "t l"]:
    """The same sum [T, l] for tokens that all devices along the axis have. It takes one all-reduce, and no capacity.

    The arguments are those of `exchange`.
    """
    local_experts = config.num_physical_experts // lax.axis_size(axis)
    expert_ids, mine = _own_experts(expert_ids, axis, local_experts)
    plan = make_dispatch_plan(expert_ids, local_experts, config.backend, row_multiple)._replace(expert_ids=None)
    return sum_used_alike(axis, compute(weights_of_experts, latent, jnp.where(mine, weights, 0), plan))


def _experts_of(compute, weights_of_experts, plan_of, round_of, rows, weights, expert_ids, num_experts, most_rows=None):
    """The weighted sums of this device's experts. Ids are indices of these experts. At most most_rows rows have one."""
    plan = plan_of(expert_ids, num_experts)._replace(expert_ids=None)  # rows are not all those of a token
    most_rows = expert_ids.size if most_rows is None else most_rows
    at_once = round_of(most_rows)
    if at_once < most_rows:
        return in_rounds(compute, at_once, weights_of_experts, rows, weights, plan)
    if most_rows < expert_ids.size:
        plan = first_rows(plan, most_rows)
    return compute(weights_of_experts, rows, weights, plan)


def _all_gather(_, axis, capacity, local_experts, experts, format, latent, expert_ids, weights):
    """Every device gets all latents and computes its experts' part of each sum. A reduce-scatter adds the parts."""
    gather, scatter = (
        partial(lax.all_gather, axis_name=axis, tiled=True),
        partial(lax.psum_scatter, axis_name=axis, tiled=True),
    )
    trip = RoundTrip(lambda leaf, _: gather(leaf), lambda rows, _: scatter(rows), format)
    latent, expert_ids, weights = to_experts(trip, latent, None), gather(expert_ids), gather(weights)
    expert_ids, mine = _own_experts(expert_ids, axis, local_experts)
    weights = jnp.where(mine, weights, 0)
    # If the capacity allows fewer rows than there are assignments, the plan has rows for this device's experts only.
    total = experts(latent, weights, expert_ids, local_experts, capacity * lax.axis_size(axis))
    return to_tokens(trip, total, None)


def _all_to_all(plan_of, axis, capacity, local_experts, experts, format, latent, expert_ids, weights):
    """Each device sends a buffer of `capacity` rows to each other device, and gets the weighted results back."""
    devices, assignments = lax.axis_size(axis), expert_ids.size
    plan = plan_of(jnp.where(expert_ids < 0, NO_EXPERT, expert_ids // local_experts), devices)
    starts = jnp.cumsum(plan.group_sizes) - plan.group_sizes
    place = jnp.arange(capacity, dtype=jnp.int32)[None]
    filled = place < plan.group_sizes[:, None]
    assignment_of_place = _get(plan.assignment_of_row, starts[:, None] + place, assignments)
    assignment_of_place = jnp.where(filled, assignment_of_place, assignments).reshape(-1)
    device = jnp.clip(expert_ids // local_experts, 0)
    place_of_assignment = device * capacity + plan.row_of_assignment - starts[device]
    place_of_assignment = jnp.where(expert_ids < 0, devices * capacity, place_of_assignment)

    swap = partial(lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
    ids = swap(_get(expert_ids.reshape(-1), assignment_of_place, NO_EXPERT))
    row_weights = swap(_get(weights.reshape(-1), assignment_of_place, 0))
    ids, mine = _own_experts(ids, axis, local_experts)
    trip = RoundTrip(
        lambda leaf, places: swap(_spread(leaf, *places)), lambda rows, places: _collect(swap(rows), *places), format
    )
    places = assignment_of_place, place_of_assignment
    out = experts(
        to_experts(trip, latent, places), jnp.where(mine, row_weights, 0)[:, None], ids[:, None], local_experts
    )
    return to_tokens(trip, out, places)


def _ragged_all_to_all(plan_of, axis, capacity, local_experts, experts, format, latent, expert_ids, weights):
    """Each device sends to each other device only the rows of its experts, and gets the weighted results back."""
    devices, me, assignments = lax.axis_size(axis), lax.axis_index(axis), expert_ids.size
    plan = plan_of(expert_ids, local_experts * devices)
    sent = jnp.sum(plan.group_sizes.reshape(devices, local_experts), axis=1)
    sizes = lax.all_gather(sent, axis)  # [from, to]
    before_in_row = jnp.cumsum(sizes, axis=1) - sizes  # where the sender has the rows for each device
    before_in_column = jnp.cumsum(sizes, axis=0) - sizes  # where the receiver puts them
    there = (before_in_row[me], sizes[me], before_in_column[me], sizes[:, me])
    back = (before_in_column[:, me], sizes[:, me], before_in_row[:, me], sizes[me])

    def send(rows, count, fill, offsets):
        buffer = jnp.full((count, *rows.shape[1:]), fill, rows.dtype)
        return lax.ragged_all_to_all(rows, buffer, *offsets, axis_name=axis)

    received = devices * capacity
    assignment_of_row, row_of_assignment = _used(plan, expert_ids >= 0)
    ids = send(_get(expert_ids.reshape(-1), assignment_of_row, NO_EXPERT), received, NO_EXPERT, there)
    ids, mine = _own_experts(ids, axis, local_experts)
    row_weights = send(_get(weights.reshape(-1), assignment_of_row, 0), received, 0, there)
    trip = RoundTrip(
        lambda leaf, ways: send(_spread(leaf, *ways[0]), received, 0, ways[1]),
        lambda rows, ways: _collect(send(rows, assignments, 0, ways[2]), *ways[0]),
        format,
    )
    ways = (assignment_of_row, row_of_assignment), there, back
    out = experts(to_experts(trip, latent, ways), jnp.where(mine, row_weights, 0)[:, None], ids[:, None], local_experts)
    return to_tokens(trip, out, ways)


def _used(plan, chosen) -> tuple[Int[Array, " r"], Int[Array, "t k"]]:
    """The assignment of each row, and the row of each assignment. T * k stands for a row or assignment out of use."""
    assignments = plan.assignment_of_row.size
    rows = jnp.arange(assignments, dtype=jnp.int32)
    assignment_of_row = jnp.where(rows < jnp.sum(plan.group_sizes), plan.assignment_of_row, assignments)
    return assignment_of_row, jnp.where(chosen, plan.row_of_assignment, assignments)


def _own_experts(expert_ids, axis, local_experts) -> tuple[Int[Array, "..."], Bool[Array, "..."]]:
    """The ids as indices of this device's experts, NO_EXPERT for others; and which ids are of this device's experts."""
    own = expert_ids - lax.axis_index(axis) * local_experts
    mine = (expert_ids >= 0) & (own >= 0) & (own < local_experts)
    return jnp.where(mine, own, NO_EXPERT), mine


def _spread(tokens: Array, assignment_of_row: Int[Array, " r"], row_of_assignment: Int[Array, "t k"]) -> Array:
    """The token of each row, [T, l] -> [R, l]. Assignment T * k is no token and gives zeros."""
    return _get(tokens, assignment_of_row // row_of_assignment.shape[1], 0)


def _collect(
    rows: Float[Array, "r l"], assignment_of_row: Int[Array, " r"], row_of_assignment: Int[Array, "t k"]
) -> Float[Array, "t l"]:
    """The sum of each token's rows, [R, l] -> [T, l], in float32 and in the order of its choices. Row R adds zero."""
    wide = at_least_float32(rows.dtype)
    total = jnp.zeros((row_of_assignment.shape[0], rows.shape[1]), wide)
    for choice in range(row_of_assignment.shape[1]):
        total += _get(rows, row_of_assignment[:, choice], 0).astype(wide)
    return total.astype(rows.dtype)


def _get(values, indices, fill):
    return values.at[indices].get(mode="fill", fill_value=fill, wrap_negative_indices=False)
