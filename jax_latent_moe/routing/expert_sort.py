"""Assignments sorted by expert, and counted: by XLA, or on a Hopper GPU by a compiled counting sort.

XLA's radix sort takes a dozen launches, and XLA scatters to count and to invert the order. That takes 0.09 ms of the 11
ms of a layer of 8192 tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from jax_latent_moe import native
from jax_latent_moe.grouped_matmul.registry import BackendConfig
from jax_latent_moe.routing.compiled import compiled_runs

MOST_EXPERTS = 2048
"""The most experts that the compiled kernel takes (custom_calls/src/routing/expert_sort.h)."""
CHUNK = 512
"""Assignments per warp of the compiled kernel."""


class Sorted(NamedTuple):
    """Assignments sorted by expert. The sort is stable, and assignments to no expert come last.

    Attributes:
        sizes: [E] int32, assignments of each expert.
        assignment_of_row: [R] int32, the assignment in each row.
        row_of_assignment: [R] int32, the row of each assignment.
    """

    sizes: Int[Array, " e"]
    assignment_of_row: Int[Array, " r"]
    row_of_assignment: Int[Array, " r"]


def sort_by_expert(expert_ids: Int[Array, "..."], num_experts: int, backend: str | BackendConfig = "auto") -> Sorted:
    """Sorts assignments by expert.

    Args:
        expert_ids: any shape, read in order; an id outside [0, num_experts) is no expert.
        num_experts: E.
        backend: the experts' backend. "auto" and `CutlassBackend` use the compiled kernel if it runs here.
    """
    ids = int32_ids(expert_ids).reshape(-1)
    if compiled_runs(backend) and num_experts <= MOST_EXPERTS:
        return compiled_sort_by_expert(ids, num_experts)
    expert = no_expert_last(ids, num_experts)
    assignment_of_row = jnp.argsort(expert, stable=True).astype(jnp.int32)
    rows = jnp.arange(expert.size, dtype=jnp.int32)
    row_of_assignment = jnp.zeros_like(rows).at[assignment_of_row].set(rows, unique_indices=True)
    return Sorted(_count(expert, num_experts), assignment_of_row, row_of_assignment)


def compiled_sort_by_expert(ids: Int[Array, " r"], num_experts: int) -> Sorted:
    """`sort_by_expert` by the compiled kernel, for ids [R] int32 and at most `MOST_EXPERTS` experts."""
    counts = (-(-ids.size // CHUNK), num_experts + 1)
    outs = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((num_experts,), ids.shape, ids.shape, counts)]
    return Sorted(*native.call("sort_by_expert", [ids], outs)[:3])


def count_experts(
    expert_ids: Int[Array, "..."], num_experts: int, backend: str | BackendConfig = "auto"
) -> Int[Array, " e"]:
    """The number of assignments to each expert, [E] int32; an id outside [0, num_experts) is no expert.

    The compiled kernel sorts as well. XLA merges its call with the call that sorts the same assignments.
    """
    ids = int32_ids(expert_ids).reshape(-1)
    if compiled_runs(backend) and num_experts <= MOST_EXPERTS:
        return compiled_sort_by_expert(ids, num_experts).sizes
    return _count(no_expert_last(ids, num_experts), num_experts)


def int32_ids(ids: Int[Array, "*any"]) -> Int32[Array, "*any"]:
    """Ids of any integer type as int32. A narrow type cannot hold every number that ids are compared with.

    An id that int32 cannot hold becomes the largest or smallest int32, which is no expert.
    """
    ids = jnp.asarray(ids)
    if ids.dtype.itemsize >= 4 and ids.dtype != jnp.int32:
        limits = jnp.iinfo(jnp.int32)
        ids = jnp.clip(ids, max(limits.min, int(jnp.iinfo(ids.dtype).min)), limits.max)
    return ids.astype(jnp.int32)


def no_expert_last(ids: Int[Array, " r"], num_experts: int) -> Int[Array, " r"]:
    """The ids as int32, with num_experts for ids that are no expert."""
    ids = int32_ids(ids)
    return jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def _count(expert, num_experts):
    # The last count is for ids that are no expert: checkify reports an index out of bounds, even one that is dropped.
    return jnp.zeros(num_experts + 1, jnp.int32).at[expert].add(1)[:num_experts]
