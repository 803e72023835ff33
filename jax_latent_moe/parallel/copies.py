"""Redundant experts: copies of busy experts on several devices, which make the devices' loads even.

The algorithm is DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB, global policy; DeepSeek-V3, arXiv
2412.19437, section 3.4). A physical expert is one copy of a logical expert. The router, its losses and its counts see
only logical experts.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jax_latent_moe.errors import InputError
from jax_latent_moe.params import Params
from jax_latent_moe.routing.expert_sort import sort_by_expert
from jax_latent_moe.routing.router import NO_EXPERT

Map = tuple[int, ...]
"""The logical expert of each physical expert, [P]. Each device along the expert axis holds P / n in a row."""


def replicate_experts(loads: Sequence[float] | np.ndarray, num_physical: int, num_devices: int) -> Map:
    """The map of physical to logical experts that makes the devices' loads even.

    Each further copy goes to the expert with the most load per copy. The copies are then placed by falling load, each
    on the least loaded device that still has a place. All devices hold the same number.

    Args:
        loads: [E], tokens of each logical expert, such as `LatentMoEAux.tokens_per_expert` of many batches added up.
        num_physical: P, at least E and a multiple of num_devices.
        num_devices: n, devices along the expert axis.

    Returns:
        `ParallelConfig.physical_to_logical`.

    Raises:
        InputError: the loads are not one finite number of at least 0 for each expert, or P does not fit.
    """
    loads = np.asarray(loads, np.float64)
    if loads.ndim != 1 or not loads.size or not np.isfinite(loads).all() or loads.min() < 0:
        raise InputError(f"loads of shape {loads.shape} must be one finite number of at least 0 for each expert.")
    integers = all(isinstance(number, int | np.integer) for number in (num_physical, num_devices))
    if not integers or num_devices < 1 or num_physical < loads.size or num_physical % num_devices:
        raise InputError(
            f"num_physical={num_physical!r} must be an integer of at least the {loads.size} experts, and a multiple of "
            f"the integer num_devices={num_devices!r}."
        )
    counts, logical = np.ones(loads.size, int), list(range(loads.size))
    for _ in range(num_physical - loads.size):
        busiest = int(np.argmax(loads / counts))
        logical.append(busiest)
        counts[busiest] += 1
    share = (loads / counts)[logical]
    held: list[list[int]] = [[] for _ in range(num_devices)]
    load = np.zeros(num_devices)
    for copy in np.argsort(-share, kind="stable"):
        open_devices = [device for device in range(num_devices) if len(held[device]) < num_physical // num_devices]
        device = min(open_devices, key=lambda device: load[device])
        held[device].append(logical[copy])
        load[device] += share[copy]
    return tuple(expert for experts in held for expert in experts)


def expand(params: Params, physical_to_logical: Map) -> Params:
    """The parameters with each expert once for each of its copies: [E, ...] becomes [P, ...].

    Differentiate through it to train: the gradient of an expert is the sum of the gradients of its copies, added in a
    fixed order.

    Args:
        params: of logical experts.
        physical_to_logical: from `replicate_experts`.

    Raises:
        InputError: the map does not name exactly the experts of params.
    """
    _check_map(jax.tree.leaves(params["experts"])[0].shape[0], physical_to_logical)
    copies = partial(_copies, tuple(physical_to_logical))
    return params | {"experts": {name: jax.tree.map(copies, leaf) for name, leaf in params["experts"].items()}}


def collapse(params: Params, physical_to_logical: Map) -> Params:
    """The parameters of logical experts, each from its first copy. It undoes `expand`.

    Args:
        params: from `expand`.
        physical_to_logical: the map that `expand` used.

    Raises:
        InputError: the map does not name exactly the experts, or its length differs from the number of experts in
            params.
    """
    _check_map(params["router"]["kernel"].shape[-1], physical_to_logical)
    for name, leaf in params["experts"].items():
        if leaf.shape[0] != len(physical_to_logical):
            raise InputError(
                f"params experts/{name} hold {leaf.shape[0]} experts, but physical_to_logical has "
                f"{len(physical_to_logical)}: give the map that `expand` used."
            )
    first = np.unique(physical_to_logical, return_index=True)[1]
    experts = {name: jax.tree.map(lambda leaf: leaf[first], leaf) for name, leaf in params["experts"].items()}
    return params | {"experts": experts}


def _check_map(num_experts: int, physical_to_logical: Map):
    if sorted(set(physical_to_logical)) != list(range(num_experts)):
        raise InputError(
            f"physical_to_logical={tuple(physical_to_logical)} must name each of the {num_experts} experts, and no "
            "others: replicate_experts makes such a map."
        )


def choose_copies(
    expert_ids: Int[Array, "t k"], physical_to_logical: Map, offset: int | Int[Array, ""], backend="auto"
) -> Int[Array, "t k"]:
    """The physical expert of each choice. The tokens of an expert take its copies in turn, in token order.

    Args:
        expert_ids: [T, k], logical experts; an id outside [0, E) is no expert.
        physical_to_logical: [P].
        offset: the copy that the first token takes; each device passes another, so that remainders spread as well.
        backend: of the experts; it may hold a kernel for the sort.
    """
    table, counts = _table(physical_to_logical)
    sizes, _, row_of_assignment = sort_by_expert(expert_ids, len(counts), backend)
    chosen = (expert_ids >= 0) & (expert_ids < len(counts))
    expert = jnp.where(chosen, expert_ids, 0)
    rank = row_of_assignment.reshape(expert_ids.shape) - (jnp.cumsum(sizes) - sizes)[expert]
    copy = (rank + offset) % jnp.asarray(counts, jnp.int32)[expert]
    return jnp.where(chosen, jnp.asarray(table, jnp.int32)[expert, copy], NO_EXPERT)


def _table(physical_to_logical: Map) -> tuple[np.ndarray, np.ndarray]:
    """The copies of each expert [E, C], filled up with P, and their number [E]."""
    logical = np.asarray(physical_to_logical)
    counts = np.bincount(logical)
    table = np.full((len(counts), counts.max()), len(logical))
    for expert, number in enumerate(counts):
        table[expert, :number] = np.flatnonzero(logical == expert)
    return table, counts


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _copies(physical_to_logical, leaf):
    return leaf[np.asarray(physical_to_logical)]


def _copies_fwd(physical_to_logical, leaf):
    return _copies(physical_to_logical, leaf), None


def _copies_bwd(physical_to_logical, _, cotangent):
    # Gathers in a fixed order: the transpose of the gather would be a scatter, whose order varies on GPUs.
    table, _ = _table(physical_to_logical)
    return (sum(cotangent.at[copies].get(mode="fill", fill_value=0) for copies in table.T),)


_copies.defvjp(_copies_fwd, _copies_bwd)
